"""Copy and move whole directories between this machine and a location (a local path or a URL).

A reader must never take a half-copied directory for a complete one. At the location, one marker file (`last`, such as
config.json) is written last, and readers refuse a directory without it. On this machine, a copy gets its final name
only when it is complete.
"""

import errno
import glob
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from elastic_core.io import storage
from elastic_core.io.atomic import check_apart
from elastic_core.io.filesystem import (
    REQUESTS_AT_ONCE,
    Location,
    StorageError,
    is_url,
    open_filesystem,
    storage_errors,
)


def upload_directory(source: Path, location: Location, last: str = "config.json") -> None:
    """Copy a local directory to `location` and replace everything there.

    The file `last` marks a complete directory: it is removed first and written last.
    Raises StorageError for a `source` without that file, and UserError for a location that is not apart from it.
    """
    source = Path(source)
    if not is_url(location):
        check_apart(location, [source])
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    if last not in names:
        raise StorageError(f"{source}: no {last}, so it is not complete; nothing was copied to {location}")
    storage.remove(storage.join(location, last))
    for name in (name for name in storage.versions(location) if name not in names):
        storage.remove(storage.join(location, name))
    for name in (name for name in names if name != last):
        storage.upload(source / name, storage.join(location, name))
    storage.upload(source / last, storage.join(location, last))


def download_directory(
    location: Location, target: Path, last: str = "config.json", only: Callable[[str], bool] | None = None
) -> None:
    """Copy the files below `location` to the new local directory `target`, which appears complete or not at all.

    `only` says of the relative name of a file whether to copy it (None: copy all). A download that was interrupted
    continues where it stopped, as long as nothing has changed at `location`.
    Raises StorageError for a `target` that exists, a location without the file `last` (see `upload_directory`), and a
    location that changes during the download.
    """
    target = Path(target)
    if target.exists():
        raise StorageError(f"{target}: exists already; remove it, or name another directory")
    versions = storage.versions(location)
    if last not in versions:
        raise StorageError(
            f"{location}: has no {last}; it is another kind of directory, or its upload was not finished"
        )
    wanted = {name: version for name, version in sorted(versions.items()) if only is None or only(name)}
    # The key names these versions of these files, so files of another version are never continued.
    key = sha256(repr(wanted).encode()).hexdigest()[:12]
    partial = target.with_name(f".{target.name}.{key}.partial")
    for outdated in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        if outdated != partial:
            shutil.rmtree(outdated)
    partial.mkdir(parents=True, exist_ok=True)
    changed = f"{location}: changed during the download; try again when nothing writes to it"
    try:
        download_files(location, [name for name in wanted if not (partial / name).exists()], partial)
    except storage.StorageUnavailable:
        raise
    except StorageError:  # a server may refuse the rest of a file of which it has another version now
        if storage.versions(location) != versions:
            raise StorageError(changed) from None
        raise
    if storage.versions(location) != versions:
        raise StorageError(changed)
    os.replace(partial, target)


def download_files(location: Location, names: Iterable[str], directory: Path) -> None:
    """Copy the files `names` below `location` to a local directory, several at a time.

    Each file appears complete or not at all. After an error, no further download starts, and the error is raised.
    """

    def download(name: str) -> None:
        storage.download(storage.join(location, name), Path(directory) / name)

    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:  # each download sends one request at a time
        list(pool.map(download, names))


def move(location: Location, target: Location, last: str = "manifest.json") -> None:
    """Move a file, or a directory with all files below it. Each of the two places is a local path or a URL.

    A local directory is renamed if it can be. Otherwise its files are copied one by one, those with the name `last` at
    the end, and then the source is removed. After an interruption the same call goes on: files that are still at
    `location` replace those at `target`, and the others at `target` stay.
    """
    if is_same(location, target) or _is_renamed(location, target):
        return
    names = sorted(storage.versions(location)) or ([""] if _is_file(location) else [])
    ends = [name for name in names if name.rpartition("/")[2] == last]
    _copy_files(location, target, [name for name in names if name not in ends])
    _copy_files(location, target, ends)
    storage.remove(location)


def is_same(location: Location, other: Location) -> bool:
    """Whether two locations are the same place, though they may be written differently."""
    if not is_url(location) and not is_url(other):
        if os.path.exists(location) and os.path.exists(other):
            return os.path.samefile(location, other)
        return os.path.realpath(location) == os.path.realpath(other)
    with storage_errors(location, "look at"):
        places = [open_filesystem(place) for place in (location, other)]
    return places[0][0] == places[1][0] and places[0][1].rstrip("/") == places[1][1].rstrip("/")


def _is_file(location: Location) -> bool:
    with storage_errors(location, "look at"):
        filesystem, path = open_filesystem(location)
        return filesystem.isfile(path)


def _is_renamed(location: Location, target: Location) -> bool:
    """Rename a local file or directory to a local path where nothing is yet. Returns whether that was possible."""
    if is_url(location) or is_url(target) or os.path.lexists(target):
        return False
    with storage_errors(location, "move"):
        os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
        try:
            os.rename(location, target)
        except OSError as error:
            if error.errno != errno.EXDEV:  # the target is on another disk
                raise
            return False
    return True


def _copy_files(location: Location, target: Location, names: list[str]) -> None:
    """Copy the files `names` below `location`. The name "" is `location` itself, which is a file then."""
    pairs = [[storage.join(place, *filter(None, [name])) for place in (location, target)] for name in names]
    with storage_errors(location, "move"):
        (filesystem, _), (other, _) = open_filesystem(location), open_filesystem(target)
        if pairs and is_url(location) and filesystem == other:  # the server copies
            paths = [[filesystem._strip_protocol(place) for place in pair] for pair in pairs]
            filesystem.copy([source for source, _ in paths], [copy for _, copy in paths])
            return
        for source, copy in pairs:
            if not is_url(copy):
                storage.download(source, Path(copy))
            elif not is_url(source):
                storage.upload(Path(source), copy)
            else:
                with TemporaryDirectory() as directory:
                    storage.download(source, Path(directory) / "file")
                    storage.upload(Path(directory) / "file", copy)


@contextmanager
def local_files(location: Location, only: Callable[[str], bool]) -> Iterator[Path]:
    """A local directory with some small files of `location`: `only` says of a relative name whether to have it.

    For a URL it is a temporary copy. For a local path it is that directory itself.
    """
    if not is_url(location):
        yield Path(location)
        return
    with TemporaryDirectory() as directory:
        download_files(location, filter(only, storage.versions(location)), directory)
        yield Path(directory)
