"""Calls readers of the product with broken input, and checks how each call ends.

A call has to end within SECONDS of CPU time and with less than MEMORY_BYTES of new memory, in success or in one
UserError that names the file. It may write only below its scratch directory, and it may start no process.
"""

import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings

from elastic_core.errors import UserError

SECONDS = 2.0  # of CPU time: other tests that run at the same time do not count
MEMORY_BYTES = 3 << 29  # of address space, so that an allocation of a claimed size fails instead of filling the memory
LONGEST_MESSAGE = 3000  # characters
QUICK_EXAMPLES = 800  # so many examples, about, have all tests together without FUZZ
CALLS, FAULTS = Counter(), {}  # by target: how many calls; the distinct faults

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
_STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"}
_RELATIVE = {"os.mkdir", "os.remove", "os.rmdir"}
_watch = threading.local()  # what the audit hook has seen in this thread's call


def examples(quick: int):
    """Settings of a fuzz test: `quick` examples, the same in every run; or more, at random, where FUZZ says how many.

    FUZZ is the number of examples of all tests together, and each test gets its part.
    """
    phases = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
    common = {"deadline": None, "database": None, "phases": phases, "suppress_health_check": list(HealthCheck)}
    if total := int(os.environ.get("FUZZ", "0")):
        return settings(max_examples=max(1, quick * total // QUICK_EXAMPLES), print_blob=True, **common)
    return settings(max_examples=quick, derandomize=True, **common)


def call(target: str, scratch: Path, function: Callable, *names: str | Path, count: bool = True):
    """The result of `function()`, or the UserError that it raised. Fails for every other end.

    target: the name under which calls are counted. scratch: the only directory to which the call may write.
    names: one of them has to stand in the message of a UserError.
    """
    if count:
        CALLS[target] += 1
    begin = time.process_time()
    try:
        with _limits(scratch) as seen:
            try:
                ended = function()
            except UserError as error:
                ended = error
        problem = _problem(ended, seen, time.process_time() - begin, names)
        assert problem is None, problem
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in last if "/tests/" not in frame.filename and "site-packages" not in frame.filename]
        place = f"{own[-1].filename}:{own[-1].lineno}" if own else str(error)[:80]
        FAULTS.setdefault(target, set()).add(f"{type(error).__name__} at {place}: {str(error)[:300]!r}")
        raise
    return ended


def _problem(ended, seen: list[str], seconds: float, names: tuple) -> str | None:
    if seen:
        return f"the call changed something outside its scratch directory: {seen[:5]}"
    if seconds > SECONDS:
        return f"the call took {seconds:.1f} seconds of CPU time"
    if not isinstance(ended, UserError):
        return None
    text = str(ended)
    if names and not any(str(name) in text for name in names):
        return f"the message names none of {[str(name) for name in names]}: {text}"
    for problem in ended.problems:
        if len(problem) > LONGEST_MESSAGE or "Traceback" in problem:
            return f"the message is no message: {problem[:200]} … ({len(problem)} characters)"
    return None


@contextmanager
def _limits(scratch: Path) -> Iterator[list[str]]:
    """Limit CPU time and memory, and list what changes outside of `scratch`. Temporary files go to `scratch`."""
    (scratch / "tmp").mkdir(exist_ok=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    earlier = signal.signal(signal.SIGPROF, _too_long)
    temporary, tempfile.tempdir = tempfile.tempdir, str(scratch / "tmp")
    _watch.root, _watch.seen = os.path.realpath(scratch), []
    if statm.is_file():
        resource.setrlimit(resource.RLIMIT_AS, (int(statm.read_text().split()[0]) * 4096 + MEMORY_BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)
    try:
        yield _watch.seen
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, earlier)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        tempfile.tempdir, _watch.root = temporary, None


def _too_long(*_) -> None:
    raise AssertionError(f"the call took more than {2 * SECONDS} seconds of CPU time")


def _audit(event: str, arguments: tuple) -> None:
    if getattr(_watch, "root", None) is None:
        return
    if event in _STARTS:
        _watch.seen.append(f"{event} {arguments[:2]!r}")
    is_change = event in _CHANGES or (event == "open" and (arguments[2] or 0) & _WRITES)
    if not is_change or not isinstance(arguments[0], (str, bytes, os.PathLike)):
        return
    path = os.fsdecode(arguments[0])
    if event in _RELATIVE and arguments[-1] not in (-1, None):  # relative to an open directory, as in shutil.rmtree
        path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), path)
    path = os.path.realpath(path)
    if not path.startswith(_watch.root) and "__pycache__" not in path and not path.startswith("/dev/"):
        _watch.seen.append(f"{event} {path}")


sys.addaudithook(_audit)
