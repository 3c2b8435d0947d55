"""Run a command that draws on this process's terminal, progress bars too, and keep its last lines."""

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import tty
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from flows.process.guard import guarded
from flows.process.output import TAIL_LINES, environment, read_chunks, read_lines


def draw(
    command: list[str],
    workspace: Path,
    log: Callable[[str], None],
    variables: Mapping[str, str] = {},
    look: Callable[[], bool] = lambda: True,
) -> tuple[int, list[str]]:
    """Like `flows.process.output.follow`, but the command sees a terminal and its output appears on this one.

    Nothing appears before `look` has returned True. `log` is not called: lines are on the terminal already.
    """
    tail, screen = deque(maxlen=TAIL_LINES), _Screen(look)
    with _terminal() as (ours, theirs), _started(command, workspace, theirs, variables) as process:
        for line in read_lines(screen.show(read_chunks(process, ours))):
            tail.append(line)
        return process.wait(), list(tail)


@contextlib.contextmanager
def _started(
    command: list[str], workspace: Path, terminal: int, variables: Mapping[str, str]
) -> Iterator[subprocess.Popen]:
    with guarded(
        command, cwd=workspace, env=environment() | dict(variables), stdout=terminal, stderr=terminal
    ) as process:
        os.close(terminal)  # the output ends when no process has it open
        yield process


class _Screen:
    """Bytes on their way to the terminal, held back until `look` returns True."""

    def __init__(self, look: Callable[[], bool]):
        self.look, self.held, self.is_open = look, b"", False

    def show(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self.is_open = self.look() or self.is_open
            self.held += chunk
            if self.is_open and self.held:
                _write(self.held)
                self.held = b""
            yield chunk


def _write(content: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()


@contextlib.contextmanager
def _terminal() -> Iterator[tuple[int, int]]:
    """A pseudo-terminal of this terminal's size: our end, and the end that the command gets. The size follows ours."""
    ours, theirs = pty.openpty()
    tty.setraw(theirs)  # bytes stay as they are; the real terminal translates line ends

    def resize(*_) -> None:
        with contextlib.suppress(OSError):  # stdout is no terminal
            fcntl.ioctl(ours, termios.TIOCSWINSZ, fcntl.ioctl(sys.stdout, termios.TIOCGWINSZ, bytes(8)))

    resize()
    before = signal.signal(signal.SIGWINCH, resize)
    try:
        yield ours, theirs
    finally:
        signal.signal(signal.SIGWINCH, before)
        os.close(ours)
