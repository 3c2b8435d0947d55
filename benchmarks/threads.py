"""Training speed by how threads wait for each other, on an idle machine and beside a busy process.

`python -m benchmarks.threads [--seconds 2] [--rounds 4]` starts a process for every way, in turns, alone and beside
a process that keeps one core busy. It prints tokens per second: the median, and its ratio to the first way when idle.
Other variables are those of a stage (tasks/runtime/environment.py). The default parent's training step is measured
(tasks/parent.py), on random tokens.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tasks.runtime.environment import DEFAULTS

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "all cores, GNU's default": {},
    "all cores, spin 1,000 (ours)": {"GOMP_SPINCOUNT": DEFAULTS["GOMP_SPINCOUNT"]},
    "all cores, spin 1,200": {"GOMP_SPINCOUNT": "1200"},
    "all cores, spin 3,000": {"GOMP_SPINCOUNT": "3000"},
    "all cores, OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def measure(seconds: float) -> float:
    """Tokens per second of the default parent's training in this process."""
    import numpy as np
    import torch
    import yaml

    from elastic_core.data.loader import PackedSequences, TokenData
    from elastic_core.data.token_files import Manifest, Source, SplitWriter
    from elastic_core.search.selection import Member
    from elastic_core.training.loop import train_step
    from elastic_core.training.run import Run
    from tasks.parent import initialise
    from tasks.parents.config import new_config
    from tasks.settings.load import read

    settings = read(yaml.safe_load((ROOT / "params.yaml").read_text()), "params.yaml")
    stage = settings.parent.training
    torch.manual_seed(0)
    model = initialise(new_config(settings.parent.model, settings.prepare_data.vocab_size), 0)
    with tempfile.TemporaryDirectory() as directory:
        manifest = Manifest(settings.prepare_data.vocab_size, 0, 0, "none", {})
        writer = SplitWriter(directory, "text", "train", manifest.dtype)
        writer.append([np.random.default_rng(0).integers(1, 1024, 200_000)], 200_000)
        manifest.sources["text"] = Source("split", {"train": writer.close()})
        manifest.write(directory)
        data = PackedSequences(TokenData(directory), {"text": 1.0}, stage.sequence_length, 0)
        run = Run(model, stage, data, {"full": 1.0}, {"full": Member(1.0, model.full)})
        for _ in range(5):
            train_step(run)
        begin, steps = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            train_step(run)
            steps += 1
        return steps * stage.num_tokens(1) / (time.perf_counter() - begin)


@contextlib.contextmanager
def busy_core(is_busy: bool) -> Iterator[None]:
    """Another process that computes for as long as the block runs."""
    if not is_busy:
        yield
        return
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(measure(arguments.seconds)))
        return
    found: dict[tuple[str, bool], list[float]] = {}
    command = [sys.executable, "-m", "benchmarks.threads", "--inside", "--seconds", str(arguments.seconds)]
    base = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    base |= {name: value for name, value in DEFAULTS.items() if name != "GOMP_SPINCOUNT"}
    for _ in range(arguments.rounds):
        for name, variables in WAYS.items():
            for is_busy in (False, True):
                with busy_core(is_busy):
                    done = subprocess.run(command, cwd=ROOT, env=base | variables, capture_output=True, check=True)
                found.setdefault((name, is_busy), []).append(json.loads(done.stdout))
    first = statistics.median(found[next(iter(WAYS)), False])
    for name in WAYS:
        idle, busy = (statistics.median(found[name, is_busy]) for is_busy in (False, True))
        print(f"{name:36} idle {idle:8,.0f} tokens/s ({idle / first:.2f} x)   busy {busy:8,.0f} ({busy / first:.2f} x)")


if __name__ == "__main__":
    main()
