"""The stages of dvc.yaml, and how one is brought up to date: what the flow and `elastic run` have in common."""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic_core.errors import UserError
from flows.process.dvc_repro import BUSY
from flows.process.output import follow
from flows.process.terminal import draw
from tasks.progress.events import VARIABLE
from tasks.progress.metrics_file import NewRows

ALWAYS = "fingerprint"  # the stage that runs always, because only it can see whether inputs outside have changed
BUSY_SECONDS = 5.0  # between looks at a stage that another DVC process holds


class StageFailed(RuntimeError):
    """A stage ended with an error; `summary` says which.

    The message has the stage's last lines too. `reason` is short: the stage and its very last line.
    """

    def __init__(self, summary: str, lines: Sequence[str] = (), stage: str = "stage"):
        super().__init__("; its last lines:\n".join([summary, "\n".join(lines)]) if lines else summary)
        self.summary = summary
        self.reason = f"{stage}: {lines[-1].removeprefix('error: ')}" if lines else summary


class StageInterrupted(StageFailed):
    """A stage ended for a reason that may be gone later: a server was away, a worker was lost."""


class WrongParameters(UserError):
    """The check of all parameters has found problems; the text has a line for each."""

    @property
    def problems(self) -> list[str]:
        return str(self).split("\n")


def check_checkout(root: Path, *needed: str) -> None:
    """Raise UserError unless `root`, where this code is installed, is a checkout that has the files `needed`."""
    missing = [name for name in ("dvc.yaml", "params.yaml", *needed) if not (root / name).is_file()]
    if missing:
        raise UserError(
            f"{root}: is no checkout (it has no {missing[0]}); clone the repository, run `make setup` in it, and use "
            "its .venv/bin/elastic"
        )


def check_command(profile: str, budgets: Mapping[str, float | str] | None, overrides: Iterable[str]) -> list[str]:
    """The command that checks all parameters of a run. It starts in the checkout and writes nothing."""
    command = [sys.executable, "-m", "tasks.commands.check", profile]
    command += [f"--set={text}" for text in overrides]
    return command + [f"--budget={name}={budget}" for name, budget in (budgets or {}).items()]


def stage_names(workspace: Path) -> list[str]:
    """The stages, foreach groups counted as one, in the order of dvc.yaml."""
    from ruamel.yaml import YAML  # not needed for --help

    return list(YAML(typ="safe").load(workspace / "dvc.yaml")["stages"])


def select(names: Sequence[str], first: str | None, last: str | None, only: Sequence[str] = ()) -> list[str]:
    """The stages of `names` from `first` until `last`, of these only those in `only` where it names any.

    The stage that runs always is the first one in any case: without it, changed inputs would not be seen.

    Raises UserError for a stage that does not exist and for a selection without any.
    """
    for name in (first, last, *only):
        if name is not None and name not in names:
            raise UserError(f"stage: got {name!r}; allowed: {', '.join(names)} (dvc.yaml)")
    start = names.index(first) if first else 0
    end = names.index(last) + 1 if last else len(names)
    chosen = [name for name in names[start:end] if not only or name in only]
    if not chosen:
        raise UserError(
            f"stages: nothing is left from {first or names[0]} until {last or names[-1]}"
            + (f" of only {', '.join(only)}" if only else "")
            + f"; their order is {', '.join(names)}"
        )
    return [*(name for name in names if name == ALWAYS and name not in chosen), *chosen]


@dataclass
class Outcome:
    """What happened in one run of DVC, as far as stages and DVC have told (tasks/progress/events.py)."""

    ran: list[str]  # stages that began, items of foreach groups by name
    status: int | None = None  # exit status of the last stage that ended

    def take(self, event: dict) -> None:
        """Take in an event."""
        if event["event"] == "begin":
            self.ran.append(event["stage"])
        elif event["event"] == "end":
            self.status = event["status"]
        elif event["event"] == "reproduced":  # also stages of other commands than `python -m tasks`, which tell nothing
            self.ran += [name for name in event["stages"] if name not in self.ran]


def reproduce(
    stage: str | None,
    workspace: Path,
    force: bool,
    log: Callable[[str], None],
    terminal: bool = False,
    watch: Callable[[dict], None] = lambda event: None,
) -> list[str]:
    """Bring one stage of dvc.yaml, or every item of a foreach group, up to date (None: all).

    Returns the names of the stages that ran, without the one that runs always.

    `log` is given each line of output, or, with `terminal`, only what is said here: the output is drawn on this
    process's terminal. `watch` is given every event of the stages, and an empty one about once a second. As long as
    another DVC process holds the stage, this one waits for it. Raises StageInterrupted where another try may help,
    StageFailed otherwise.
    """
    waiting = False
    while True:
        outcome = Outcome([])
        status, lines = _try(stage, workspace, force, log, terminal, watch, waiting, outcome)
        if status == 0:
            return [name for name in outcome.ran if name != ALWAYS]
        if status != BUSY:
            raise _failure(stage, workspace, status, outcome, lines)
        if not waiting:
            log("Waiting until it is free …")
        waiting = True
        time.sleep(BUSY_SECONDS)


def _try(
    stage, workspace: Path, force: bool, log, terminal: bool, watch, waiting: bool, outcome: Outcome
) -> tuple[int, list[str]]:
    """Run DVC once. Where `waiting`, what it prints before a stage begins has been said before and is held back."""
    with tempfile.TemporaryDirectory(prefix="elastic-") as directory:
        events = NewRows(Path(directory) / "events.jsonl")
        command = [sys.executable, "-m", "flows.process.dvc_repro", "--events", str(events.path)]
        command += ([stage] if stage else []) + (["--force"] if force else [])

        def look() -> bool:
            """Take in new events; whether output may be shown."""
            for event in events.read():
                outcome.take(event)
                watch(event)
            watch({})
            return bool(outcome.ran) or not waiting

        show = draw if terminal else follow
        status, lines = show(command, workspace, log, {VARIABLE: str(events.path)}, look)
        began = bool(outcome.ran)
        look()
    if waiting and not began and status != BUSY:
        log("\n".join(lines))  # was held back
    return status, lines


def _failure(stage: str | None, workspace: Path, status: int, outcome: Outcome, lines: list[str]) -> StageFailed:
    name = f"stage {outcome.ran[-1] if outcome.ran and not stage else stage!r}" if stage or outcome.ran else "DVC"
    known = outcome.status if outcome.status not in (None, 0) else status
    kind = StageInterrupted if outcome.status == os.EX_TEMPFAIL else StageFailed
    return kind(f"{name} ended with exit status {known} in {workspace}", lines, name.replace("'", ""))
