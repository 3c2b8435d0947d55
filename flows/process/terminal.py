"""A command that draws on this process's terminal, bars and all, while what it prints is read along."""

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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from flows.process.guard import guarded
from flows.process.output import TAIL_LINES, environment, read_chunks, read_lines


def draw(
    command: list[str], workspace: Path, log: Callable[[str], None], begin: str | None = None
) -> tuple[int, list[str]]:
    """Like `flows.process.output.follow`, but the command sees a terminal and its output appears on this one as it comes.

    With `begin`, nothing appears before a line that begins so: of a command that is tried again and again.
    """
    tail, screen = deque(maxlen=TAIL_LINES), _Screen(hold=begin is not None)
    with _terminal() as (ours, theirs), _started(command, workspace, theirs) as process:
        for line in read_lines(screen.show(read_chunks(process, ours))):
            if begin is not None and line.startswith(begin):
                screen.release()
            tail.append(line)
            log(line)
        return process.wait(), list(tail)


@contextlib.contextmanager
def _started(command: list[str], workspace: Path, terminal: int) -> Iterator[subprocess.Popen]:
    with guarded(command, cwd=workspace, env=environment(), stdout=terminal, stderr=terminal) as process:
        os.close(terminal)  # here; the end of the output shows when nobody has it open any more
        yield process


class _Screen:
    """Bytes on their way to the terminal, held back until they are released."""

    def __init__(self, hold: bool):
        self.held: list[bytes] | None = [] if hold else None

    def show(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            if self.held is None:
                _write(chunk)
            else:
                self.held.append(chunk)
            yield chunk

    def release(self) -> None:
        if self.held is not None:
            _write(b"".join(self.held))
            self.held = None


def _write(content: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()


@contextlib.contextmanager
def _terminal() -> Iterator[tuple[int, int]]:
    """A terminal of this one's size, also when that changes: our end and the end that a command is given."""
    ours, theirs = pty.openpty()
    tty.setraw(theirs)  # bytes stay as they are: the terminal that they are drawn on ends lines as it likes

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
