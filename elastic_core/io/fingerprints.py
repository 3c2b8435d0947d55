"""Fingerprints of files that are inputs of a run: they change when the files change, and are cheap to take.

- A local file of up to SMALL_BYTES: the digest of its content. It is kept, and the file is read again only if its size,
  times or inode have changed.
- A larger local file: its size and the time of its last change.
- A file at a URL: its size and the version that the server tells (see `storage.states`), or, if it tells none, the
  digest of its content.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from elastic_core.errors import UserError
from elastic_core.io import storage
from elastic_core.io.atomic import write_text
from elastic_core.io.json_files import read_json

SMALL_BYTES = 64 << 20


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(location: storage.Location, cache: DigestCache, only: Callable[[str], bool] | None = None) -> dict:
    """The fingerprint of the files that match a pattern or are below a location: {"files", "bytes", "sha256"}.

    `only` says of the relative name of a file whether it counts (None: all do). Python's compiled files do not count.
    Where nothing is, the number of files is 0. Raises StorageError for a server that cannot be used.
    """
    found = {name: state for name, state in storage.states(location).items() if "__pycache__" not in name}
    names = [name for name in found if only is None or only(name)]
    digest = hashlib.sha256()
    for name in names:
        size, version = found[name]
        if version is None:
            version = _read_state(_path(location, name), size, cache)
        digest.update(json.dumps([name, size, version]).encode())
    return {"files": len(names), "bytes": sum(found[name][0] for name in names), "sha256": digest.hexdigest()}


def _path(location: storage.Location, name: str) -> str:
    return storage.join(storage.fixed_part(location), name) if name != "." else os.fspath(location)


def _read_state(path: str, size: int, cache: DigestCache) -> str:
    """A text that changes when a file changes of which no version is known."""
    if storage.is_url(path):
        with storage.open_binary(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    stat = os.stat(path)
    return f"changed {stat.st_mtime_ns}" if size > SMALL_BYTES else cache.digest(Path(path), stat)


class DigestCache:
    """Digests of local files, kept in a JSON file: path → [size, times, inode, digest]."""

    def __init__(self, path: str | os.PathLike):
        self.path, self.changed = Path(path), False
        try:
            self.entries = read_json(self.path, shape={str: list})
        except (OSError, UserError):  # it does not exist yet or is damaged: start a new one
            self.entries = {}

    def digest(self, path: Path, stat: os.stat_result) -> str:
        """The SHA-256 digest of a file with this `stat`."""
        name = str(path.absolute())
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        if self.entries.get(name, ())[:-1] != state:
            self.entries[name], self.changed = [*state, file_digest(path)], True
        return self.entries[name][-1]

    def save(self) -> None:
        """Write the file if a digest has changed. Files that are gone are left out."""
        if self.changed:
            write_text(self.path, json.dumps({name: e for name, e in self.entries.items() if os.path.exists(name)}))
