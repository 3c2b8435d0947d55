"""A stage ends with the DVC that started it, however that ends; a stage that nobody's DVC started goes on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[3]
STAGE = """
import signal, time
from tasks.runtime import stop_with_dvc
stop_with_dvc.LOOK_SECONDS, stop_with_dvc.GRACE_SECONDS = 0.1, 0.2
stop_with_dvc.start()
{first}
print("started", flush=True)
time.sleep(600)
"""
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
# As DVC runs a stage: by a shell that becomes the command, or that waits for it.
DVC = """
import subprocess, sys
subprocess.run(["sh", "-c", sys.argv[1], "sh", sys.executable, "-c", sys.argv[2]])
"""
BECOMES, STAYS = 'exec "$@"', '"$@"; true'


LOOKS = 0.5  # seconds, for several looks of a stage


def ends_within(seconds, process):
    """Wait for the end of a process; one that nobody collects counts as ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.02)
                continue
        return True
    return False


@contextlib.contextmanager
def started(shell=BECOMES, first="", **variables):
    """The process that stands for DVC, and its stage."""
    kept = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
    command = [sys.executable, "-c", DVC, shell, STAGE.format(first=first)]
    variables = {**kept, "PYTHONPATH": str(ROOT), **variables}
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as dvc:
        assert dvc.stdout.readline() == "started\n"
        stage = psutil.Process(dvc.pid).children(recursive=True)[-1]
        try:
            yield dvc, stage
        finally:
            for process in (dvc, stage):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            dvc.stdout.close()


@pytest.mark.parametrize("shell", [BECOMES, STAYS], ids=["becomes", "stays"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_stage_ends_soon_after_its_dvc(shell, number):
    with started(shell, DVC_STAGE="rank") as (dvc, stage):
        dvc.send_signal(number)
        dvc.wait()
        assert ends_within(5, stage)


def test_a_stage_that_does_not_listen_is_killed():
    with started(first=DEAF, DVC_STAGE="rank") as (dvc, stage):
        dvc.kill()
        assert ends_within(5, stage)


def test_a_stage_goes_on_as_long_as_its_dvc_does():
    with started(DVC_STAGE="rank") as (_, stage):
        assert not ends_within(LOOKS, stage)


def test_what_no_dvc_started_goes_on_alone():
    with started() as (dvc, stage):
        dvc.kill()
        dvc.wait()
        assert not ends_within(LOOKS, stage)
