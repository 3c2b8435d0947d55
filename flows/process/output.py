"""The output of a command, line by line as it comes; of a progress bar only a line every few seconds."""

import codecs
import errno
import math
import os
import re
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from flows.process.guard import guarded
from tasks.runtime.environment import DEFAULTS

TAIL_LINES = 20  # of a command's output, kept for the error it may end with
PROGRESS_SECONDS = 10.0  # between two lines of one progress bar
# A line and its end. A carriage return at the very end is not read yet: the next byte may make it "\r\n".
_LINE = re.compile(r"([^\r\n]*)(\r?\n|\r(?=[^\n]))")
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def follow(
    command: list[str],
    workspace: Path,
    log: Callable[[str], None],
    variables: Mapping[str, str] = {},
    look: Callable[[], bool] = lambda: True,
) -> tuple[int, list[str]]:
    """Run a command under the guard, hand each line of its output to `log`; the exit status and the last lines.

    `variables` are added to its environment. `look` is called for every line and about once a second; a line is handed
    on only where it returns True.
    """
    tail = deque(maxlen=TAIL_LINES)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with guarded(command, cwd=workspace, env=environment() | dict(variables), **pipes) as process:
        for line in read_lines(watched(read_chunks(process, process.stdout.fileno()), look)):
            tail.append(line)
            if look():
                log(line)
        return process.wait(), list(tail)


def watched(chunks: Iterable[bytes], look: Callable[[], bool]) -> Iterator[bytes]:
    """The chunks; `look` is called for each."""
    for chunk in chunks:
        look()
        yield chunk


def environment() -> dict[str, str]:
    """This process's environment, changed so that `python` is this Python, and lines are not buffered."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**DEFAULTS, **os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"}


def read_chunks(process: subprocess.Popen, source: int) -> Iterator[bytes]:
    """The process's output as it comes, and an empty chunk every second without any; `source` is where it is read."""
    while True:
        ready, _, _ = select.select([source], [], [], 1.0)
        if ready:
            try:
                chunk = os.read(source, 65536)
            except OSError as error:
                if error.errno != errno.EIO:  # Linux raises it when the other end of a terminal is closed
                    raise
                return
            if not chunk:
                return
            yield chunk
        elif process.poll() is not None:
            return  # the guard was killed: processes of the command may still hold the pipe open
        else:
            yield b""


def read_lines(chunks: Iterable[bytes], every: float = PROGRESS_SECONDS) -> Iterator[str]:
    """Split output into lines, without blank lines and colours.

    A progress bar ends its lines with a carriage return: of these lines one is yielded every `every` seconds, and
    always the last one.
    """
    hidden, shown_at = "", -math.inf
    for line, end in _split(chunks):
        if end != "\r":
            line, hidden = line or hidden, ""
        elif line and time.monotonic() - shown_at < every:
            line, hidden = "", line
        elif line:
            hidden, shown_at = "", time.monotonic()
        if line:
            yield line


def _split(chunks: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """Each line without colours, and its end: "\\r" where the next line overwrites it, else "\\n"."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    rest = ""
    for chunk in chunks:
        rest += decoder.decode(chunk)
        start = 0
        for match in _LINE.finditer(rest):
            start = match.end()
            yield _COLOUR.sub("", match[1]).rstrip(), match[2][-1]
        rest = rest[start:]
    yield _COLOUR.sub("", rest).rstrip(), "\n"
