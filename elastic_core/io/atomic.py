"""Local files and directories that appear whole or not at all: written beside the final place, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elastic_core.errors import UserError


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path beside `path` to write to, and rename it at the end; the directory is made.

    Where the block fails, `path` keeps what it held.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a local file in UTF-8, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def whole_directory(directory: str | os.PathLike, marker: str | None = "config.json") -> Iterator[Path]:
    """Yield a directory beside `directory` to fill, and rename it at the end.

    Replaces an earlier directory that holds the file `marker`, or an empty one, and refuses to replace anything else
    (UserError); with `marker` None it replaces whatever is there. The earlier directory is moved aside and dropped
    last; where a killed process left it aside, it is moved back first.
    """
    final = Path(directory)
    partial, earlier = (final.with_name(f".{final.name}.{kind}") for kind in ("partial", "earlier"))
    _tidy_up(final, partial, earlier)
    if marker is not None and final.exists() and not (final / marker).is_file() and not _is_empty(final):
        raise UserError(f"{final}: exists and has no {marker}; name another directory, or remove it")
    partial.mkdir(parents=True)
    try:
        yield partial
        if final.exists():
            os.replace(final, earlier)
        os.replace(partial, final)
    finally:
        _tidy_up(final, partial, earlier)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _tidy_up(final: Path, partial: Path, earlier: Path) -> None:
    """Drop what is not whole; of two whole directories the new one stays."""
    shutil.rmtree(partial, ignore_errors=True)
    if earlier.exists():
        if final.exists():
            os.replace(earlier, partial)  # a half-deleted directory must never be taken for a whole one
            shutil.rmtree(partial)
        else:
            os.replace(earlier, final)
