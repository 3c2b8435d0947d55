"""Copy whole directories between this machine and a location (a local path or a URL).

A reader must never take a half-copied directory for a complete one. At the location, one marker file (`last`, such as
config.json) is written last, and readers refuse a directory without it. On this machine, a copy gets its final name
only when it is complete.
"""

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
from elastic_core.io.filesystem import REQUESTS_AT_ONCE, Location, StorageError, is_url


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
