"""Local files and directories that appear complete or not at all: written under a temporary name, then renamed."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from elastic_core.errors import UserError

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}  # of a file system without hard links


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same directory to write to; rename it to `path` at the end.

    Creates the directory of `path`. If the block raises, `path` stays as it was.
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
    """Write a local file in UTF-8, complete or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def create_file(path: str | os.PathLike, data: bytes) -> None:
    """Write a new local file, complete or not at all. Raises FileExistsError if it exists: one of several gets it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        partial.write_bytes(data)
        try:
            os.link(partial, path)  # a rename would replace the file of another process
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with open(path, "xb") as file:
                file.write(data)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_directory(
    directory: str | os.PathLike, marker: str | None = "config.json", work: Path | None = None
) -> Iterator[Path]:
    """Yield a temporary directory to fill; rename it to `directory` at the end.

    The temporary directory is beside `directory`, and it is empty. With `work`, it is that directory, on the same disk.
    It keeps its files if the block raises or the process is killed, so that the work can go on.

    An existing directory is replaced if it is empty or holds the file `marker`; for any other, UserError is raised.
    `marker` None replaces any directory. If `directory` is a link, the directory that it points to is replaced. The
    existing directory is renamed first and deleted last. If an earlier process was killed between these two steps, the
    directory gets its name back at the start.
    """
    final = Path(directory)
    if final.is_symlink() or final.name in ("", ".."):  # a link would itself be renamed; "." has no name
        final = final.resolve()
    partial, earlier = (final.with_name(f".{final.name}.{kind}") for kind in ("partial", "earlier"))
    _remove_leftovers(final, partial, earlier)
    filled = partial if work is None else work
    _check_marker(final, marker)
    filled.mkdir(parents=True, exist_ok=work is not None)
    try:
        yield filled
        if final.exists():
            os.replace(final, earlier)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(filled, final)
    finally:
        _remove_leftovers(final, partial, earlier)


def check_out(directory: str | os.PathLike, force: bool) -> None:
    """Raise UserError if a command may not write a model to `directory`. Call it before the work for that starts.

    A directory that exists and is not empty is replaced only with `force`, and only if it holds a model (see
    `whole_directory`).
    """
    if not force and os.path.lexists(directory) and not _is_empty(Path(directory)):
        raise UserError(f"{directory}: exists; name another directory, or replace it with --force")
    _check_marker(Path(directory), "config.json")


def check_apart(directory: str | os.PathLike, sources: Iterable[str | os.PathLike], inside: bool = False) -> None:
    """Raise UserError if a directory that is replaced is one of the files and directories `sources`, which are read.

    It may not contain one of them either, nor, without `inside`, lie in one. Links are followed.
    """
    final = Path(directory).resolve()
    for source in sources:
        read = Path(source).resolve()
        if read.is_relative_to(final):
            raise UserError(f"{directory}: is {source} or contains it; name another directory")
        if final.is_relative_to(read) and not inside:
            raise UserError(f"{directory}: lies in {source}; name another directory")


def _check_marker(final: Path, marker: str | None) -> None:
    """Raise UserError for an existing directory that is neither empty nor holds the file `marker`."""
    if marker is not None and final.exists() and not (final / marker).is_file() and not _is_empty(final):
        raise UserError(f"{final}: exists and has no {marker}; name another directory, or remove it")


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _remove_leftovers(final: Path, partial: Path, earlier: Path) -> None:
    """Delete the incomplete directory. If two complete directories exist, keep the new one, else the earlier one."""
    shutil.rmtree(partial, ignore_errors=True)
    if earlier.exists():
        if final.exists():
            # Renamed before it is deleted: if a kill stops the deletion, the rest must not count as complete.
            os.replace(earlier, partial)
            shutil.rmtree(partial)
        else:
            os.replace(earlier, final)
