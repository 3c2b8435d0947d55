"""Places: local paths, or URLs such as s3://bucket/models that fsspec's libraries serve.

Reading, writing, listing and copying, the same for both. A server that is away is waited for, request by request,
with exponential back-off, up to about five minutes (see filesystem.py); then comes a StorageUnavailable.
"""

import glob as local_glob
import io
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from elastic_core.io.atomic import whole_file
from elastic_core.io.filesystem import (
    REQUESTS_AT_ONCE,
    S3_SCHEMES,
    Location,
    StorageError,
    StorageUnavailable,
    explained,
    is_url,
    open_filesystem,
    scheme_of,
)

__all__ = [
    "StorageError",
    "StorageUnavailable",
    "check_access",
    "download",
    "download_directory",
    "download_files",
    "exists",
    "glob",
    "is_url",
    "join",
    "list_names",
    "local_files",
    "open_binary",
    "read_bytes",
    "remove",
    "upload",
    "upload_directory",
    "write_bytes",
]

BLOCK_BYTES = 4 << 20  # asked for at once when reading
_PART_BYTES = 16 << 20  # of a multipart upload
_MOST_PARTS = 10_000  # that S3 takes
_WILDCARD = re.compile(r"[*?\[]")


def join(place: Location, *names: str) -> str:
    """The place of `names` below `place`."""
    return "/".join([place.rstrip("/"), *names]) if is_url(place) else os.path.join(place, *names)


def exists(place: Location) -> bool:
    """Whether a file or a directory is there (on S3: an object, or objects below)."""
    with explained(place, "look at"):
        filesystem, path = open_filesystem(place)
        try:
            filesystem.info(path)
        except FileNotFoundError:
            return False
        return True


def glob(pattern: str) -> dict[str, int]:
    """The files that match `pattern` (``*``, ``?``, ``[…]``, and ``**`` for any depth), in order, with their bytes."""
    if not is_url(pattern):
        paths = sorted(path for path in map(Path, local_glob.glob(pattern, recursive=True)) if path.is_file())
        return {str(path): path.stat().st_size for path in paths}
    with explained(pattern, "list"):
        filesystem, path = open_filesystem(pattern)
        found = filesystem.glob(path, detail=True)
        sizes = {name: entry["size"] for name, entry in sorted(found.items()) if entry["type"] == "file"}
    return {filesystem.unstrip_protocol(name): size for name, size in sizes.items()}


def list_names(url: Location) -> list[str]:
    """Names of the files and directories directly below, in order; none where nothing is there. Always asked anew.

    Some S3 servers go on listing a directory for a while after its last object is gone.
    """
    with explained(url, "list"):
        filesystem, path = open_filesystem(url)
        try:
            entries = filesystem.ls(path, detail=False)
        except FileNotFoundError:
            return []
    names = {entry.rstrip("/").removeprefix(path.rstrip("/") + "/") for entry in entries}
    return sorted(name for name in names if name and "/" not in name)  # a file is listed as itself


def read_bytes(url: Location) -> bytes:
    """A small file's content."""
    with explained(url, "read"):
        filesystem, path = open_filesystem(url)
        return filesystem.cat_file(path)


def write_bytes(url: Location, data: bytes) -> None:
    """Write a small file, replacing what was there; on S3 it appears whole or not at all."""
    with explained(url, "write"):
        filesystem, path = open_filesystem(url)
        filesystem.pipe_file(path, data)


def remove(url: Location) -> None:
    """Remove a file or all files below a directory; nothing happens where nothing is. A whole bucket is refused."""
    with explained(url, "remove"):
        filesystem, path = open_filesystem(url)
        if is_url(url) and "/" not in path.strip("/"):
            raise StorageError(f"{url}: names a whole bucket, which is not removed; name a place inside it")
        if files := _files(filesystem, path):
            filesystem.rm(list(files))
            if _files(filesystem, path):  # s3fs says nothing of what the server did not remove
                raise StorageError(f"{url}: not all of it could be removed; the credentials may not allow it")
        if not is_url(url) and Path(url).is_dir():
            shutil.rmtree(url)


@contextmanager
def open_binary(place: Location, block_bytes: int = BLOCK_BYTES) -> Iterator[io.BufferedReader]:
    """A file to read from, seekable and never whole in memory; a URL's is asked for in blocks as they are needed.

    Smaller blocks are for readers that jump and know how much they want: a longer read is one request in any case.
    """
    if not is_url(place):
        with open(place, "rb") as file:
            yield file
        return
    with explained(place, "read"):
        filesystem, path = open_filesystem(place)
        file = filesystem.open(path, "rb", block_size=block_bytes, cache_type="none")
    with file, io.BufferedReader(_Blocks(file, place), block_bytes) as reader:
        yield reader


class _Blocks(io.RawIOBase):
    """Reads `file`, and says it in our words where that fails."""

    def __init__(self, file, place: Location):
        self.file, self.place = file, place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readinto(self, buffer) -> int:
        with explained(self.place, "read"):
            return self.file.readinto(buffer)

    def readall(self) -> bytes:
        with explained(self.place, "read"):  # Python's own asks for 8 KiB at a time
            return self.file.read()


def upload(source: Path, url: Location) -> None:
    """Copy a local file to `url`, large ones in parts; on S3 it appears whole or not at all."""
    size = Path(source).stat().st_size
    with explained(url, "write"):
        filesystem, path = open_filesystem(url)
        part_bytes = max(_PART_BYTES, -(-size // _MOST_PARTS))
        parts = {"chunksize": part_bytes} if scheme_of(url) in S3_SCHEMES else {}
        try:
            filesystem.put_file(str(source), path, **parts)
        except FileNotFoundError:
            # A server that came back may have joined the parts already, or lost them: the upload's id is unknown then.
            filesystem.put_file(str(source), path, **parts)
        if filesystem.info(path)["size"] != size:
            raise StorageError(f"{url}: holds another number of bytes than {source}, which was written to it")


def download(url: Location, target: Path) -> None:
    """Copy `url` to a local file, which appears whole or not at all."""
    with whole_file(target) as partial, open_binary(url) as file, open(partial, "wb") as copy:
        shutil.copyfileobj(file, copy, BLOCK_BYTES)


def download_files(url: Location, names: Iterable[str], directory: Path) -> None:
    """Copy the files `names` below `url` to a local directory, some at a time; each appears whole or not at all."""
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:  # one request each; an error leaves the files behind it out
        list(pool.map(lambda name: download(join(url, name), Path(directory) / name), names))


def upload_directory(source: Path, url: Location, last: str = "config.json") -> None:
    """Copy a local directory to `url`, replacing what was there.

    The file named `last`, without which no reader takes the directory for whole, is removed first and written last.
    """
    source = Path(source)
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    if last not in names:
        raise StorageError(f"{source}: no {last}, so it is not whole; nothing was copied to {url}")
    remove(join(url, last))
    for name in (name for name in _listing(url) if name not in names):
        remove(join(url, name))
    for name in (name for name in names if name != last):
        upload(source / name, join(url, name))
    upload(source / last, join(url, last))


def download_directory(url: Location, target: Path, last: str = "config.json", only: Set[str] | None = None) -> None:
    """Copy the files below `url` (of the relative names `only`; None: all) to a new directory, whole or not at all.

    Refuses a place without the file named `last` (see `upload_directory`) and a `target` that is there already. One
    that was cut off goes on where it stood, as long as nothing has changed at `url`.
    """
    target = Path(target)
    if target.exists():
        raise StorageError(f"{target}: exists already; remove it, or name another directory")
    listing = _listing(url)
    if last not in listing:
        raise StorageError(f"{url}: no {last} there; it is no such directory, or not completely written")
    wanted = {name: mark for name, mark in sorted(listing.items()) if only is None or name in only}
    key = sha256(repr(wanted).encode()).hexdigest()[:12]
    partial = target.with_name(f".{target.name}.{key}.partial")
    for outdated in target.parent.glob(f".{local_glob.escape(target.name)}.*.partial"):
        if outdated != partial:
            shutil.rmtree(outdated)
    partial.mkdir(parents=True, exist_ok=True)
    download_files(url, [name for name in wanted if not (partial / name).exists()], partial)
    if _listing(url) != listing:
        raise StorageError(f"{url}: changed while it was read; try again when nothing writes to it")
    os.replace(partial, target)


@contextmanager
def local_files(place: Location, names: tuple[str, ...]) -> Iterator[Path]:
    """A local directory with those of the small files `names` that `place` has: a temporary copy where it is a URL."""
    if not is_url(place):
        yield Path(place)
        return
    with TemporaryDirectory() as directory:
        download_files(place, set(names) & set(list_names(place)), directory)
        yield Path(directory)


def check_access(url: Location, writing: bool) -> None:
    """Refuse a place that cannot be used, within seconds: StorageError says what is wrong and where to change it.

    Of a pattern, what is before its first wildcard counts. The place need not exist yet, but its bucket has to. With
    `writing`, a small object is written below it and removed again.
    """
    with explained(url, "write to" if writing else "read"):
        filesystem, path = open_filesystem(url, patient=False)
        path = _WILDCARD.split(path)[0]
        if scheme_of(url) in S3_SCHEMES:  # listing one object tells a missing bucket from an empty one
            bucket, key, _ = filesystem.split_path(path)
            filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
        elif not writing:
            filesystem.exists(path)
        if writing:
            probe = f"{path.rstrip('/')}/.access-{secrets.token_hex(8)}"
            filesystem.pipe_file(probe, b"-")
            filesystem.rm_file(probe)


def _files(filesystem, path: str) -> dict[str, dict]:
    """All files at or below a path, by their own paths, with what the file system says of each."""
    found = filesystem.find(path, detail=True)
    return {name: entry for name, entry in found.items() if entry["type"] == "file"}  # an empty directory lists itself


def _listing(url: Location) -> dict[str, tuple]:
    """Every file below `url` by its relative name, with what changes when it does."""
    with explained(url, "list"):
        filesystem, path = open_filesystem(url)
        found = _files(filesystem, path)
    marks = ("size", "ETag", "mtime", "created")
    prefix = path.rstrip("/") + "/"
    return {
        name.removeprefix(prefix): tuple(str(entry.get(mark)) for mark in marks)
        for name, entry in found.items()
        if name.startswith(prefix)
    }
