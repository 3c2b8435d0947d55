"""How training is shown: a progress bar or lines, a file with a row per step, and the optional dashboards."""

import contextlib
import dataclasses
import json
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from elastic_core.io.atomic import write_text
from elastic_core.training.stage import Stage
from tasks.progress import events
from tasks.progress.durations import duration
from tasks.progress.metrics_file import NewRows, drop_cut_off_line, plain, read_rows, smooth
from tasks.progress.tracking import open_writers
from tasks.settings.sections import Tracking

FOLLOW_SECONDS = 0.5  # between two looks at a file that another process writes
LOG_SECONDS = 10.0  # between two lines in a log
RATE_SECONDS, RATE_STEPS = 60.0, 20  # the rate covers the last minute, or 20 steps where they take longer


class Recorder:
    """Passes the rows that `train` yields to a display and to the file `metrics`.

    One process of a run uses it, as a context manager. The directory of `metrics` has the name of the run's key, so a
    resumed run adds to the file of the killed one. `display` False: another process shows the rows (see `followed`).
    `clock` counts seconds.
    """

    def __init__(
        self,
        name: str,
        stage: Stage,
        metrics: Path,
        tracking: Tracking | None = None,
        clock: Callable[[], float] = time.monotonic,
        display: bool = True,
    ):
        self.name, self.stage, self.metrics, self.tracking = name, stage, Path(metrics), tracking or Tracking()
        self.speed = Speed(clock)
        self.has_begun = False
        self.display = Display(name, stage, clock) if display else None

    def __enter__(self):
        configuration = {"name": self.name, **dataclasses.asdict(self.stage)}
        directory = self.metrics.parent
        self.writers = open_writers(self.tracking, directory.name, directory, configuration)
        directory.mkdir(parents=True, exist_ok=True)
        drop_cut_off_line(self.metrics)
        self.file = open(self.metrics, "a", buffering=1)
        size = {"num_tokens": self.stage.num_tokens(), "num_steps": self.stage.steps}
        events.note(event="training", name=self.name, **size, path=str(self.metrics))
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self.display is not None:
            self.display.close()
        self.file.close()
        for writer in self.writers:
            writer.close(failed=kind is not None)

    def show(self, row: dict) -> None:
        """Write and show the row of one step."""
        row = plain(row)
        if not self.has_begun and row["step"] > 1:
            events.note(event="resumed", name=self.name, step=row["step"] - 1)
        self.has_begun = True
        rate = self.speed.update(row["tokens"], row["mode"])
        left = None if rate is None else (self.stage.num_tokens() - row["tokens"]) / rate
        row |= {"tokens_per_second": rate, "seconds_left": left}
        self.file.write(json.dumps(row, allow_nan=False) + "\n")
        for writer in self.writers:
            writer.write(row)
        if self.display is not None:
            self.display.show(row)

    def finish(self, out: Path) -> None:
        """Write the rows of the whole run to `out`, one per step; the file appears whole or not at all."""
        write_text(out, "".join(json.dumps(row, allow_nan=False) + "\n" for row in read_rows(self.metrics)))


class Display:
    """Shows rows of metrics: a progress bar on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, name: str, stage: Stage, clock: Callable[[], float] = time.monotonic):
        self.name, self.stage, self.clock = name, stage, clock
        # Budget → smoothed loss and KL, last budget error; in the order of the stage, so that columns keep their
        # places.
        self.means: dict[str, dict[str, float]] = {name: {} for name, share in stage.budget_shares.items() if share}
        self.on_terminal = sys.stderr.isatty()
        self.bars: list[tqdm] = []  # on a terminal: the bar, and the line of numbers below it
        self.last_time, self.waiting_line = -math.inf, None

    def show(self, row: dict) -> None:
        """Show a row of the metrics file."""
        for budget, numbers in row["budgets"].items():
            smooth(self.means.setdefault(budget, {}), numbers)
        if self.on_terminal:
            self._move_bar(row)
        else:
            self._print_line(row)

    def close(self) -> None:
        """Leave the last state on the terminal."""
        for bar in reversed(self.bars):
            bar.close()
        if self.waiting_line is not None:
            print(self.waiting_line, flush=True)

    def _move_bar(self, row: dict) -> None:
        text = describe(row, self.means)
        if not self.bars:  # after the first step, which may compile and must not count for the rate
            bar = tqdm(
                total=self.stage.num_tokens(),
                initial=row["tokens"],
                desc=self.name,
                unit=" tokens",
                unit_scale=True,
                dynamic_ncols=True,
                miniters=1,
                disable=False,
                smoothing=0.05,  # steps of different budgets take different times
            )
            # A second line: most terminals have no room beside the bar. The empty {bar} makes tqdm shorten the text.
            numbers = tqdm(
                desc=text, bar_format="{desc}{bar}", dynamic_ncols=True, miniters=1, position=1, disable=False
            )
            self.bars = [bar, numbers]
        bar, numbers = self.bars
        bar.update(row["tokens"] - bar.n)
        numbers.set_description_str(text, refresh=False)
        numbers.update()

    def _print_line(self, row: dict) -> None:
        parts = [f"{self.name}: step {row['step']}/{self.stage.steps}"]
        parts.append(f"{row['tokens']:,}/{self.stage.num_tokens():,} tokens")
        if row["tokens_per_second"] is not None:
            parts.append(f"{row['tokens_per_second']:,.0f} tokens/s, {duration(row['seconds_left'])} left")
        self.waiting_line = ", ".join([*parts, describe(row, self.means)])
        now = self.clock()
        if now - self.last_time >= LOG_SECONDS:
            print(self.waiting_line, flush=True)
            self.last_time, self.waiting_line = now, None


@contextlib.contextmanager
def followed(name: str, stage: Stage, metrics: Path) -> Iterator[None]:
    """Show the rows that other processes add to `metrics`, as long as the block runs."""
    display, ended = Display(name, stage), threading.Event()
    new_rows = NewRows(metrics, skip=True)

    def follow() -> None:
        last_look = False
        while not last_look:
            last_look = ended.wait(FOLLOW_SECONDS)
            for row in new_rows.read():
                display.show(row)

    follower = threading.Thread(target=follow, name="progress", daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()
        display.close()


class Speed:
    """Tokens per second over the last steps of this process. The first step may compile and does not count."""

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.mode, self.rate = clock, None, None
        self.samples: deque[tuple[float, int]] = deque()  # (time, tokens) at the end of a step

    def update(self, tokens: int, mode: str) -> float | None:
        """The rate after a step that ended at `tokens`; None before the second step."""
        if mode != self.mode:  # sliced steps are faster than soft ones: measure anew, show the old rate meanwhile
            self.samples.clear()
            self.mode = mode
        self.samples.append((self.clock(), tokens))
        now = self.samples[-1][0]
        while len(self.samples) > RATE_STEPS + 1 and now - self.samples[0][0] > RATE_SECONDS:
            self.samples.popleft()
        elapsed, done = now - self.samples[0][0], tokens - self.samples[0][1]
        if elapsed > 0 and done > 0:
            self.rate = done / elapsed
        return self.rate


def describe(row: dict, means: dict[str, dict[str, float]]) -> str:
    """Mode, losses and other numbers of a step, the most important first: a narrow terminal cuts off the rest."""
    losses = [
        f"{budget} " + "/".join(f"{values[name]:.3f}" if name in values else "–" for name in ("loss", "kl"))
        for budget, values in means.items()
    ]
    parts = [row["mode"], f"loss/KL {', '.join(losses)}"]
    if row.get("skipped"):
        parts.append(f"{row['skipped']} skipped")
    if errors := [values["budget_error"] for values in means.values() if "budget_error" in values]:
        parts.append(f"budget error {max(errors):.1%}")
    if row.get("memory_bytes") is not None:
        parts.append(f"{row['memory_bytes'] / 2**30:.2f} GiB")
    return ", ".join(parts)
