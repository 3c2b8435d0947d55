"""Processes of a trial: started with a mark that every descendant inherits, found again by it, and ended."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil

MARK = "SOAK_MARK"
FOREIGN = ("PREFECT_", "RAY_", "DVC_", "AWS_")  # settings around us that must not reach a trial
THREADS = "1"  # sums differ in rounding with the number of threads, and cores are shared


def environment(mark: str, **more: str) -> dict[str, str]:
    """What a trial's processes see: ours without settings of the tools, and the mark."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return kept | {
        MARK: mark,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "OMP_NUM_THREADS": THREADS,
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # for `stacks`
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        **more,
    }


def new_mark() -> str:
    return uuid.uuid4().hex


def start(command: list[str], directory: Path, log: Path, variables: dict[str, str]) -> subprocess.Popen:
    """Start a command in `directory`, with its output in `log`."""
    with open(log, "w") as file:
        return subprocess.Popen(
            command, cwd=directory, env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )


def living(mark: str, name: str = "") -> list[psutil.Process]:
    """The processes that carry the mark, and `name` in their command line; the oldest first."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            is_ours = process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
            if is_ours and name in " ".join(process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def left_after(mark: str, seconds: float) -> list[str]:
    """The command lines of what carries the mark and has not ended within `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := living(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    lines = []
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            lines.append(f"{process.pid} {' '.join(process.cmdline())[:100].strip()}")
    return lines


def stacks(mark: str, log: Path, ray: Path) -> str:
    """Where every Python process with the mark stands: it is aborted, and writes that to its log.

    `log` is the log of the process that was started; the logs of Ray's workers are below `ray`.
    """
    names = {process.pid: " ".join(process.cmdline())[:60].strip() for process in living(mark)}
    for process in reversed(living(mark)):  # the workers before those that end when a worker does
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGABRT)
    time.sleep(1.0)
    found = [f"processes: {names}"]
    for path in (log, *sorted(ray.rglob("worker-*.err"))):
        text = path.read_text(errors="replace")
        if "Fatal Python error: Aborted" in text:
            text = re.sub(r"\nExtension modules: .*", "", text[text.index("Fatal Python error: Aborted") :])
            found.append(f"{path.name}: {text[:6000]}")
    return "\n".join(found)


@contextlib.contextmanager
def marked() -> Iterator[str]:
    """A new mark; what carries it at the end of the block is killed."""
    mark = new_mark()
    try:
        yield mark
    finally:
        while left := living(mark):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.1)
