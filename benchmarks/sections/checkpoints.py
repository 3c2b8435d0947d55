"""What saving checkpoints costs training: the time for which a step is kept waiting, against the interval's."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.report import FAIL, PASS, Row, measured
from benchmarks.shapes import RandomTokens
from elastic_core.search.selection import Member
from elastic_core.training.loop import train
from elastic_core.training.run import Run
from tasks.parent import initialise
from tasks.parents.config import new_config
from tasks.settings.load import load

MOST = 0.02
PARAMETERS = Path(__file__).resolve().parents[2] / "params.yaml"
INTERVALS = 3


def rows(quick: bool) -> Iterator[Row]:
    """The default parent in its own training stage, on random tokens."""
    settings = load(PARAMETERS)
    stage = replace(settings.parent.training, mixture={"random": 1.0})
    if quick:
        stage = replace(stage, batch_size=2, sequence_length=24)
    every = 6 if quick else stage.checkpoint_every
    stage = replace(stage, checkpoint_every=every, steps=every * INTERVALS + (3 if quick else every // 2))
    config = new_config(settings.parent.model, settings.prepare_data.vocab_size, eos_token_id=0)
    model = initialise(config, 0)
    data = RandomTokens(config.vocab_size, stage.sequence_length)
    with tempfile.TemporaryDirectory(prefix="elastic-checkpoints-") as temporary:
        members = {"full": Member(1.0, model.full)}
        run = Run(model, stage, data, {"full": 1.0}, members=members, checkpoints=temporary)
        blocked, steps = timed(run)
        size = sum(path.stat().st_size for path in Path(temporary).rglob("*") if path.is_file())
    kept = len(list(range(every, stage.steps, every)))
    # A save begins behind a checkpoint's row, before the next step. The first also starts torch's threads.
    saves = [blocked[step] for step in range(every, every * INTERVALS + 1, every)]
    usual = statistics.median(value for step, value in blocked.items() if step % every)
    cost = statistics.mean(saves) - usual
    interval = every * statistics.median(steps)
    what = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, every {every} steps, {kept} saves"
    result = f"{cost / interval:.2%} ({cost * 1e3:.0f} ms of {interval:.1f} s)"
    if quick:
        yield measured("checkpoints, training blocked", what, result)
    else:
        status = PASS if cost / interval <= MOST else FAIL
        yield Row("checkpoints, training blocked", what, result, f"≤ {MOST:.0%}", status)
    slower = [max(0.0, steps[step] - statistics.median(steps)) for step in range(every, every * INTERVALS + 1, every)]
    written = f"{size / 1e6:.0f} MB of checkpoints kept"
    yield measured(
        "checkpoints, step while it is written",
        written,
        f"{statistics.mean(slower) * 1e3:.0f} ms slower, {statistics.mean(slower) / interval:.2%}",
    )


def timed(run: Run) -> tuple[dict[int, float], list[float]]:
    """Seconds that training spent outside of steps, by the step before; and those of every step."""
    blocked, steps, training = {}, [], train(run)
    begin = time.perf_counter()
    for row in training:
        blocked[row["step"] - 1] = time.perf_counter() - begin - row["seconds"]
        steps.append(row["seconds"])
        begin = time.perf_counter()
    return blocked, steps
