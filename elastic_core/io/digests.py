"""SHA-256 digests of files, and the key of a run: a digest of its configuration and the contents of its inputs."""

import hashlib
import json
import os
from pathlib import Path

from elastic_core.errors import UserError
from elastic_core.io.atomic import write_text

# Format of training checkpoints. It is a part of every run key, so no run finds checkpoints of another format.
FORMAT = 2


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_key(configuration: dict, inputs: list[str | os.PathLike], cache: str | os.PathLike | None = None) -> str:
    """A key of 16 hexadecimal digits for a configuration and the contents of its input files and directories.

    Any change of the configuration or of a content changes the key. A run that stores its checkpoints under this key
    resumes its own checkpoints and never those of another configuration. `cache` is a JSON file with the digests of
    files that were read before. A file is read again only if its size, its times or its inode changed.
    Raises UserError for an input that does not exist.
    """
    digests = _read_cache(cache)
    digest = hashlib.sha256(json.dumps([FORMAT, configuration], sort_keys=True, default=str).encode())
    for root in map(Path, inputs):
        if not root.exists():
            raise UserError(f"{root}: not there; run the stage that makes it first")
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.is_file():
                digest.update(str(path.relative_to(root)).encode() + _cached_digest(path, digests).encode())
    if cache is not None:
        _write_cache(Path(cache), digests)
    return digest.hexdigest()[:16]


def _cached_digest(path: Path, digests: dict[str, list]) -> str:
    """The digest of a file; `digests` maps paths to [size, times, inode, digest]."""
    stat = path.stat()
    state, name = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino], str(path.absolute())
    if name not in digests or digests[name][:-1] != state:
        digests[name] = [*state, file_digest(path)]
    return digests[name][-1]


def _read_cache(cache: str | os.PathLike | None) -> dict[str, list]:
    try:
        return json.loads(Path(cache).read_text()) if cache is not None else {}
    except (OSError, ValueError):  # it does not exist yet or is truncated: start a new one
        return {}


def _write_cache(cache: Path, digests: dict[str, list]) -> None:
    write_text(cache, json.dumps({name: entry for name, entry in digests.items() if os.path.exists(name)}))
