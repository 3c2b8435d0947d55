"""Nothing of a local Ray cluster outlives the process that started it.

Ray's processes watch each other, yet workers that are still starting when that process is killed stay for half a
minute. So a small process of its own (this file) holds the end of a pipe to it, and when the pipe closes kills all
that carry the cluster's mark in their environment, which every process of the cluster inherits.
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
LOOKS, LOOK_SECONDS = 3, 0.1  # a process that is just being started can be missing from one look


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Whatever is started in the block, and inherits our environment, has ended when the block or this process has."""
    mark = uuid.uuid4().hex
    # Of a session of its own: Ctrl-C on the terminal is not for it.
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
    """Kill what carries the mark until nothing does."""
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
    sys.stdin.read()  # nobody writes: it returns when the other end is closed
    kill_marked(sys.argv[1])
