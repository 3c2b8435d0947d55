"""The memory of a sharded step in the shapes of the 12B, on tensors that pretend to be on a GPU, against the plan."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cuda import guard, interpreted

ROOT = Path(__file__).parents[2]
NEAR = 0.15  # of what is counted

pytestmark = [
    pytest.mark.cuda_path,
    pytest.mark.timeout(900),
    pytest.mark.skipif(guard.reason() is not None, reason=guard.reason() or ""),
]


def count(*arguments: str) -> dict:
    command = [sys.executable, "-m", "tests.support.cuda.memory_cases", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def test_the_plan_counts_what_a_sharded_step_holds():
    found = count()
    assert found.keys() == {"train_short", "train_extended"}
    for stage in found.values():
        assert stage["planned"] == pytest.approx(stage["counted"], rel=NEAR), stage
    assert found["train_short"]["with kernels"] is None  # the router learns with gates


@pytest.mark.skipif(interpreted.reason() is not None, reason=interpreted.reason() or "")
def test_the_plan_counts_what_kernels_hold():
    (stage,) = count("kernels").values()
    assert stage["with kernels"] == pytest.approx(stage["counted"], rel=NEAR), stage
    assert stage["with kernels"] < stage["planned"]
