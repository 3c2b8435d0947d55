"""A stage ends with the `dvc` that started it: when DVC is killed, its stages would go on with nobody waiting."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil

LOOK_SECONDS = 0.5
GRACE_SECONDS = 5.0  # between TERM and KILL to ourselves
SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "fish"}


def start() -> None:
    """Watch the `dvc` process that runs this stage, if one does, and end this process soon after it.

    Call it before slow imports: a stage whose DVC has died by then can no longer tell which process that was.
    """
    if "DVC_STAGE" not in os.environ:  # set by DVC for its stages
        return
    chain = [psutil.Process()]
    try:
        chain.append(chain[-1].parent())
        if Path(chain[-1].name()).name in SHELLS:  # DVC runs commands by a shell, which may or may not stay
            chain.append(chain[-1].parent())
        expected = [process.pid for process in chain[1:]]
    except (psutil.NoSuchProcess, AttributeError):  # already orphaned
        expected = [-1]
    threading.Thread(target=_watch, args=(expected,), name="stop with dvc", daemon=True).start()


def _watch(expected: list[int]) -> None:
    while _ancestors(len(expected)) == expected:
        time.sleep(LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _ancestors(count: int) -> list[int]:
    """The process numbers of the parent, its parent, …: the child of a dead process has another parent."""
    found, number = [], os.getpid()
    for _ in range(count):
        try:
            number = psutil.Process(number).ppid()
        except psutil.NoSuchProcess:
            return found
        found.append(number)
    return found
