"""Refuses and notes every call to another host, in each Python process that has this directory on its PYTHONPATH.

Audit hooks are told by the interpreter itself of what goes through its sockets, whichever library asks for it.
"""

import os
import sys

NOTES = "OUTSIDE_CALLS"  # in the environment: the file that gets a line for each attempt
HOSTS = {"socket.connect": 1, "socket.sendto": 1, "socket.sendmsg": 1}  # event → where its address is
NAMES = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}
HERE = ("127.", "::1", "localhost", "0.0.0.0")


def refuse(event: str, arguments: tuple) -> None:
    """The audit hook."""
    if event in HOSTS:
        address = arguments[HOSTS[event]]
        host = address[0] if isinstance(address, tuple) else None  # else a path, or None for a connected socket
    elif event in NAMES:
        host = arguments[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if not host or host == "::" or host.startswith(HERE):
        return
    with open(os.environ[NOTES], "a") as notes:
        print(f"{event} {host} by {' '.join(getattr(sys, 'argv', ['?']))}", file=notes)
    raise ConnectionRefusedError(f"{event} of {host}: this test allows no other host")


sys.addaudithook(refuse)
