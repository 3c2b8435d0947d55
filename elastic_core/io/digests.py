"""Fingerprints of files, and of a run: its configuration together with the contents of its inputs."""

import hashlib
import json
import os
from pathlib import Path

from elastic_core.errors import UserError
from elastic_core.io.atomic import write_text

FORMAT = 2  # of checkpoints: a run never looks at those of another format


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_key(configuration: dict, inputs: list[str | os.PathLike], cache: str | os.PathLike | None = None) -> str:
    """A name for (configuration, contents of the input files and directories): what changes either changes the name.

    A run that is keyed by it never resumes another configuration's checkpoint, and always its own. `cache`, a JSON
    file, remembers the digests of files whose size and time of change stayed the same: large inputs are read once.
    """
    known = _read_cache(cache)
    digest = hashlib.sha256(json.dumps([FORMAT, configuration], sort_keys=True, default=str).encode())
    for root in map(Path, inputs):
        if not root.exists():
            raise UserError(f"{root}: not there; run the stage that makes it first")
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.is_file():
                digest.update(str(path.relative_to(root)).encode() + _remembered_digest(path, known).encode())
    if cache is not None:
        _write_cache(Path(cache), known)
    return digest.hexdigest()[:16]


def _remembered_digest(path: Path, known: dict[str, list]) -> str:
    stat = path.stat()
    state, name = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino], str(path.absolute())
    if name not in known or known[name][:-1] != state:
        known[name] = [*state, file_digest(path)]
    return known[name][-1]


def _read_cache(cache: str | os.PathLike | None) -> dict[str, list]:
    try:
        return json.loads(Path(cache).read_text()) if cache is not None else {}
    except (OSError, ValueError):  # none yet, or cut short: it is made anew
        return {}


def _write_cache(cache: Path, known: dict[str, list]) -> None:
    write_text(cache, json.dumps({name: entry for name, entry in known.items() if os.path.exists(name)}))
