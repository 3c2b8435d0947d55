"""One process at a time works on a run, also if processes on several machines share nothing but its storage.

The process holds a lease: a file ``lease-00000001.json`` at the location. The number grows with every holder, and the
highest number holds. Taking a lease creates the next number, which only one process can do. The holder rewrites its
file every HEARTBEAT_SECONDS.

A holder on this machine is dead when its process has ended. A holder on another machine is dead when its file has not
changed for EXPIRE_SECONDS of the observer's own clock, so the clocks of machines need not agree. A holder that could
give no sign of life for so long, because it was suspended or cut off, ends. A full disk ends nobody, because it has no
space for another lease either.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from elastic_core.config import ConfigError
from elastic_core.io import storage
from elastic_core.io.json_files import parse_json

HEARTBEAT_SECONDS = 10.0
EXPIRE_SECONDS = 360.0  # longer than the back-off of a request to a server that is away (elastic_core/io/filesystem.py)
LOOK_SECONDS = 1.0  # between two looks at the lease of another machine
PREFIX, SUFFIX = "lease-", ".json"
CONTENT = {"id": str, "process": int, "started": float, "host": str, "machine": str}


@contextmanager
def only_one(location: storage.Location, what: str) -> Iterator[None]:
    """Hold the run at `location` for this process. `what` names the run in messages.

    Raises ConfigError if another process holds it. If another process takes the run over, because this one gave no sign
    of life, this process ends.
    """

    with ExitStack() as stack:
        try:
            stack.enter_context(held(location, what))
        except Held as error:
            raise ConfigError(
                f"{what} already runs with these parameters and inputs ({error.holder}, which holds {location}); wait "
                "for it, or stop it"
            ) from None
        yield


@contextmanager
def held(location: storage.Location, what: str) -> Iterator[None]:
    """As `only_one`, but raises Held if another process holds `location`."""

    def end(reason: str) -> None:
        print(f"error: {what}: {location}: {reason}; this process ends", file=sys.stderr, flush=True)
        os._exit(os.EX_TEMPFAIL)

    def wait(holder: str) -> None:
        print(f"{what}: {location} is held by {holder}; waiting for a sign of life", flush=True)

    with kept(take(location, wait), end):
        yield


class Held(Exception):
    """Another process holds the lease. `holder` says which: its process and machine."""

    def __init__(self, location: storage.Location, holder: str):
        super().__init__(f"{location} is held by {holder}")
        self.holder = holder


@contextmanager
def kept(lease: Lease, on_lost: Callable[[str], None]) -> Iterator[None]:
    """Give signs of life for the length of the block, and release the lease at its end.

    `on_lost(reason)` is called in another thread if another process has taken the lease, or may have taken it, because
    this one could give no sign of life for EXPIRE_SECONDS.
    """
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(lease, ended, on_lost), name="lease", daemon=True)
    watch = threading.Thread(target=_watch, args=(lease, ended, on_lost), name="lease watch", daemon=True)
    heart.start()
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()
        heart.join()
        with suppress(storage.StorageError):
            for number in _numbers(lease.location):
                if number <= lease.number:
                    storage.remove(_file(lease.location, number))


def holder_of(location: storage.Location) -> str | None:
    """Who holds the lease: a process and its machine. None if nobody does, or a process of this machine that ended.

    A holder on another machine may be dead.
    """
    newest = _read_newest(location)
    if newest is None or _has_ended(newest[1]):
        return None
    return _describe(newest[1])


def is_lease(name: str) -> bool:
    """Whether a file with this name at a location is a lease, or one that is being written."""
    return name.lstrip(".").startswith(PREFIX)


class Lease:
    """A lease that this process holds."""

    def __init__(self, location: storage.Location, number: int):
        self.location, self.number, self.beats, self.last_beat = location, number, 0, now()
        self.owner = {
            "id": secrets.token_hex(8),
            "process": os.getpid(),
            "started": _started(psutil.Process()),
            "host": socket.gethostname(),
            "machine": _machine(),
        }

    def content(self) -> bytes:
        return json.dumps({**self.owner, "beats": self.beats}).encode()

    def create(self) -> bool:
        """Create the file, unless another process has created it. Returns whether the lease is held now."""
        storage.create_bytes(_file(self.location, self.number), self.content())
        # The answer to a request may be lost, and some servers overwrite: what is stored decides.
        return self.is_stored()

    def is_stored(self) -> bool:
        """Whether the newest lease is this one."""
        newest = _read_newest(self.location)
        return newest is not None and newest[1].get("id") == self.owner["id"]


def take(location: storage.Location, on_wait: Callable[[str], None] = lambda holder: None) -> Lease:
    """The lease of a directory or URL. A dead holder's lease is taken over.

    Raises Held: at once for a holder on this machine, after HEARTBEAT_SECONDS for one on another machine. Before it
    waits for a sign of life, it calls `on_wait(holder)`.
    """
    seen, since = None, time.monotonic()
    while True:
        newest = _read_newest(location)
        if newest is None or _has_ended(newest[1]) or (seen == newest and time.monotonic() - since >= EXPIRE_SECONDS):
            lease = Lease(location, 1 if newest is None else newest[0] + 1)
            if lease.create():
                return lease
            seen = None
            continue
        content = newest[1]
        if content.get("machine") == _machine() or (seen is not None and seen != newest):
            raise Held(location, _describe(content))
        if seen is None:
            on_wait(_describe(content))
            seen, since = newest, time.monotonic()
        time.sleep(LOOK_SECONDS)


def _watch(lease: Lease, ended: threading.Event, on_lost: Callable[[str], None]) -> None:
    """Call `on_lost` if no sign of life has arrived for too long: a request may hang in the other thread."""
    while not ended.wait(LOOK_SECONDS):
        if now() - lease.last_beat > EXPIRE_SECONDS:
            on_lost(
                f"no sign of life could be written for {EXPIRE_SECONDS:g} s, so another process may have taken over"
            )
            return


def now() -> float:
    """Seconds of a clock that also runs while this machine is suspended, if the system has one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _beat(lease: Lease, ended: threading.Event, on_lost: Callable[[str], None]) -> None:
    """Give signs of life until `ended` is set or the lease is lost."""
    while not ended.wait(HEARTBEAT_SECONDS):
        lease.beats += 1
        sent = now()  # before the request: others count from its arrival, which is earlier than its answer
        with suppress(storage.StorageError, OSError):  # `_watch` ends the process if this does not get better
            if not lease.is_stored():
                newest = _read_newest(lease.location)
                on_lost("the lease was removed" if newest is None else f"{_describe(newest[1])} has taken over")
                return
            # On a disk that is full, nobody else can take over either.
            with suppress(*([] if storage.is_url(lease.location) else [storage.StorageError, OSError])):
                storage.write_bytes(_file(lease.location, lease.number), lease.content())
            lease.last_beat = sent


def _read_newest(location: storage.Location) -> tuple[int, dict] | None:
    """(number, content) of the lease with the highest number. The content is empty while it is written.

    A damaged content counts as empty.
    """
    numbers = _numbers(location)
    if not numbers:
        return None
    try:
        return numbers[-1], parse_json(storage.read_bytes(_file(location, numbers[-1])), location, CONTENT)
    except (storage.StorageError, OSError) as error:
        if isinstance(error, storage.StorageUnavailable):
            raise
        return _read_newest(location) if _numbers(location) != numbers else (numbers[-1], {})
    except ValueError:
        return numbers[-1], {}


def _numbers(location: storage.Location) -> list[int]:
    """The numbers of all leases at a location, in order."""
    names = (name for name in storage.list_names(location) if name.startswith(PREFIX) and name.endswith(SUFFIX))
    digits = (name.removeprefix(PREFIX).removesuffix(SUFFIX) for name in names)
    return sorted(int(number) for number in digits if number.isdigit())


def _file(location: storage.Location, number: int) -> str:
    return storage.join(location, f"{PREFIX}{number:08d}{SUFFIX}")


def _has_ended(content: dict) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    if content.get("machine") != _machine():
        return False
    try:
        process = psutil.Process(content["process"])
        is_another = abs(_started(process) - content["started"]) > 1.0
        return is_another or process.status() == psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError, OverflowError):  # the latter two: a number that no process can have
        return True


def _started(process: psutil.Process) -> float:
    """When a process started, in seconds since this machine's boot: changes of its clock do not matter."""
    return process.create_time() - psutil.boot_time()


def _machine() -> str:
    """What tells this machine from others: its boot, and within it the container (a process number means one in it)."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _describe(content: dict) -> str:
    if not content:
        return "a process that has just begun"
    return f"process {content['process']} of {content['host']}"
