"""No process of a local Ray cluster outlives the process that started the cluster.

Ray's processes watch each other, but a worker that is still starting when that process is killed stays for half a
minute. So a small watcher process (this file) holds one end of a pipe to it. When the pipe closes, the watcher kills
every process that carries the cluster's mark in its environment; all processes of the cluster inherit the mark.
"""

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import psutil

VARIABLE = "ELASTIC_CLUSTER"
LOOKS, LOOK_SECONDS = 3, 0.1  # one look can miss a process that is just starting


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """When the block or this process ends, every process that was started in the block ends too."""
    mark = uuid.uuid4().hex
    # In its own session: Ctrl-C on the terminal must not end the watcher.
    watcher = subprocess.Popen(
        [sys.executable, "-P", __file__, mark], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    os.environ[VARIABLE] = mark
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        watcher.stdin.close()
        watcher.wait()


def kill_marked(mark: str) -> None:
    """Kill the processes that carry the mark, until none is left."""
    empty_looks = 0
    while empty_looks < LOOKS:
        found = [process for process in psutil.process_iter() if _carries(process, mark)]
        empty_looks = 0 if found else empty_looks + 1
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(LOOK_SECONDS)


def _carries(process: psutil.Process, mark: str) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return process.environ().get(VARIABLE) == mark and process.status() != psutil.STATUS_ZOMBIE
    return False


if __name__ == "__main__":
    sys.stdin.read()  # returns when the other end is closed
    kill_marked(sys.argv[1])
