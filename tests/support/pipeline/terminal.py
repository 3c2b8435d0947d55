"""A terminal for what is drawn on stderr."""

import contextlib
import fcntl
import os
import re
import struct
import termios
import threading


class Terminal:
    """A real terminal of so many columns in place of stderr; afterwards `text` is what was written to it.

    `frames` are the lines that were drawn, in their order.
    """

    def __init__(self, columns: int):
        self.columns, self.chunks = columns, []

    def __enter__(self):
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, self.columns, 0, 0))
        self.reader = threading.Thread(target=self.drain)
        self.reader.start()
        self.file = os.fdopen(slave, "w")
        self.redirection = contextlib.redirect_stderr(self.file)
        self.redirection.__enter__()

    def drain(self):
        with contextlib.suppress(OSError):  # how Linux reports that the other end is closed
            while chunk := os.read(self.master, 65536):
                self.chunks.append(chunk)

    def __exit__(self, *exception):
        self.redirection.__exit__(*exception)
        self.file.close()
        self.reader.join(60)
        os.close(self.master)
        self.text = b"".join(self.chunks).decode()
        parts = re.split(r"[\r\n]+|\x1b\[A", self.text)  # the last one moves a line up
        self.frames = [part.strip() for part in parts if part.strip()]
