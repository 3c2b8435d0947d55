"""What a stage has started for its cluster ends with the stage, however that ends and whatever session it went to."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak.processes import environment, left_after, living, marked

ROOT = Path(__file__).resolve().parents[3]
CODE = """
import subprocess, sys, time
from tasks.runtime.ray_cleanup import nothing_left
with nothing_left():
    subprocess.Popen(["sh", "-c", "trap '' TERM; setsid sleep 600 & sleep 600"])
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    print("started", flush=True)
    time.sleep(float(sys.argv[1]))
print("left the block")
"""


def start(mark: str, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", CODE, str(seconds)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(mark), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_killed_owner_leaves_nothing(number):
    with marked() as mark, start(mark, 600) as process:
        assert living(mark, "sleep 600")
        process.send_signal(number)
        process.wait(60)
        assert left_after(mark, 10) == []


def test_the_end_of_the_block_leaves_nothing_and_the_owner_goes_on():
    with marked() as mark, start(mark, 0) as process:
        assert process.stdout.read() == "left the block\n"
        assert process.wait(60) == 0
        assert left_after(mark, 0) == []
