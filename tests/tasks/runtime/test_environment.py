"""OpenMP reads the variables that a stage sets before it imports torch."""

import os
import subprocess
import sys

import pytest

from tasks.runtime.environment import DEFAULTS

SHOW = "from tasks.runtime import environment; environment.set_defaults(); import torch"


@pytest.mark.parametrize(
    "chosen, expected", [({}, DEFAULTS["GOMP_SPINCOUNT"]), ({"GOMP_SPINCOUNT": "77"}, "77")], ids=["default", "chosen"]
)
def test_threads_wait_as_the_caller_has_chosen_and_else_by_the_default(chosen, expected):
    others = {name: value for name, value in os.environ.items() if name not in DEFAULTS}
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        env=others | chosen | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch's OpenMP is not GNU's")
    assert f"GOMP_SPINCOUNT = '{expected}'" in done.stderr


def test_the_variables_are_printed_for_env_with_those_that_the_caller_has_chosen():
    others = {name: value for name, value in os.environ.items() if name not in DEFAULTS}
    command = [sys.executable, "-m", "tasks.runtime.environment"]
    done = subprocess.run(command, env=others | {"OMP_NUM_THREADS": "7"}, capture_output=True, text=True, check=True)
    assert dict(item.split("=") for item in done.stdout.split()) == DEFAULTS | {"OMP_NUM_THREADS": "7"}
