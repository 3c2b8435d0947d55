"""Runs the cases of a module in a process of its own: it may pretend that there is a GPU, or change Triton."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
MARK = "RESULT "


def results_of(module: str, *arguments: str) -> dict:
    """What `python -m tests.support.cuda.MODULE` says in the line that begins with RESULT."""
    command = [sys.executable, "-m", f"tests.support.cuda.{module}", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix(MARK))
