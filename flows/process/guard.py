"""Run a command so that none of its processes outlives the caller.

The caller writes `with guarded(command) as process:`. That starts this file as a small process, the guard. The guard
starts the command and holds the reading end of a pipe to the caller. It ends the command and all its descendants when

- the pipe closes, because the block was left or the caller died, also by SIGKILL;
- the guard itself gets TERM, INT or HUP;
- the command has ended and has left processes behind.

The guard sends TERM to every descendant, and KILL to those that are still there after a grace period. On Linux the
guard is a "child subreaper": orphans become its children, so it finds also processes in other sessions. On other
systems it finds only the processes of its own process group.
"""

import argparse
import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import psutil

GRACE_SECONDS = 5.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@contextlib.contextmanager
def guarded(command: Sequence[str], grace: float = GRACE_SECONDS, **options) -> Iterator[subprocess.Popen]:
    """Start `command` under a guard. When the block is left, every process of the command has ended.

    `options` go to subprocess.Popen. The yielded process is the guard: it ends with the command's exit status
    (128 + n after signal n).
    """
    guard = [sys.executable, "-P", __file__, "--grace", str(grace), "--", *command]
    process = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True, **options)
    try:
        yield process
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=grace + 5)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # The group is empty, unless the guard was killed or the wait was interrupted.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def adopt_orphans() -> None:
    """Make this process the new parent of descendants whose parent dies (on Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(grace: float = GRACE_SECONDS) -> None:
    """TERM to every descendant of this process, KILL to those still there after `grace` seconds; wait for the end."""
    deadline = time.monotonic() + grace
    told = set()
    empty_looks = 0
    while empty_looks < 2:  # one look misses a process whose parent dies while the process table is read
        descendants = _living_descendants()
        empty_looks = 0 if descendants else empty_looks + 1
        late = time.monotonic() >= deadline
        for process in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                if late:
                    process.kill()
                elif process not in told:
                    told.add(process)
                    process.terminate()
        time.sleep(0.05)  # psutil.wait_procs would take the exit statuses of our children


def _living_descendants() -> list[psutil.Process]:
    living = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


def run(command: Sequence[str], grace: float) -> int:
    """Run `command` until it ends or the guard is told to stop, then end its descendants; the exit status."""
    if os.getpgrp() != os.getpid():
        os.setsid()
    adopt_orphans()
    wake = _signals_as_bytes((*STOP_SIGNALS, signal.SIGCHLD))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    stop = False
    while not stop and child.poll() is None:
        ready, _, _ = select.select([sys.stdin, wake], [], [])
        # Nothing is written to stdin: when it is readable, it is closed.
        stop = sys.stdin in ready or bool(set(STOP_SIGNALS).intersection(os.read(wake, 64)))
    end_descendants(grace)
    status = child.wait()
    return 128 - status if status < 0 else status


def _signals_as_bytes(numbers: Sequence[signal.Signals]) -> int:
    """Turn these signals into bytes (their numbers) on a pipe and return its reading end, for use with select."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, lambda *_: None)  # without a handler no byte is written
    return reader


def main() -> int:
    parser = argparse.ArgumentParser(description="Run COMMAND and end all its processes when our stdin closes.")
    parser.add_argument("--grace", type=float, default=GRACE_SECONDS, help="seconds between TERM and KILL")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="the command and its arguments, after --")
    arguments = parser.parse_args()
    return run(arguments.command, arguments.grace)


if __name__ == "__main__":
    sys.exit(main())
