"""Read, write, list, copy and remove files at a location: a local path, or a URL such as s3://bucket/models.

The functions are the same for both. If a server does not answer, every request is repeated with exponential back-off
for about five minutes (see filesystem.py). Then the function raises StorageUnavailable. Every other failure raises
StorageError. Copies and moves of whole directories are in directory_transfer.py.
"""

import glob as local_glob
import io
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elastic_core.io.atomic import create_file, whole_file
from elastic_core.io.filesystem import (
    S3_SCHEMES,
    AlreadyExists,
    BlockReader,
    Location,
    RemoteFile,
    StorageError,
    StorageUnavailable,
    is_url,
    open_filesystem,
    scheme_of,
    storage_errors,
)

__all__ = [
    "Location",
    "StorageError",
    "StorageUnavailable",
    "check_access",
    "create_bytes",
    "download",
    "exists",
    "fixed_part",
    "glob",
    "is_url",
    "join",
    "list_names",
    "num_bytes",
    "open_binary",
    "read_bytes",
    "remove",
    "states",
    "upload",
    "versions",
    "write_bytes",
]

BLOCK_BYTES = 4 << 20  # size of one read request
_PART_BYTES = 16 << 20  # of a multipart upload
_MOST_PARTS = 10_000  # limit of S3
_WILDCARD = re.compile(r"[*?\[]")


def join(location: Location, *names: str) -> str:
    """The location of `names` below `location`."""
    return "/".join([location.rstrip("/"), *names]) if is_url(location) else os.path.join(location, *names)


def exists(location: Location) -> bool:
    """Whether a file or a directory exists; on S3, an object or objects below this name."""
    with storage_errors(location, "look at"):
        filesystem, path = open_filesystem(location)
        try:
            filesystem.info(path)
        except FileNotFoundError:
            return False
        return True


def glob(pattern: str) -> dict[str, int]:
    """The files that match `pattern`, sorted, with their sizes in bytes.

    Wildcards are ``*``, ``?``, ``[…]``, and ``**`` for directories of any depth. They are literal in the leading part
    of a local path that exists, such as a directory ``[v2]``.
    Raises StorageError for a link to a file that does not exist.
    """
    if not is_url(pattern):
        literal, rest = _split(pattern)
        with storage_errors(pattern, "list"):
            paths = sorted(map(Path, local_glob.glob(local_glob.escape(literal) + rest, recursive=True)))
            for path in paths:
                if path.is_symlink() and not path.exists():
                    raise StorageError(f"{path}: a link to {os.readlink(path)}, which does not exist; remove the link")
            return {str(path): path.stat().st_size for path in paths if path.is_file()}
    with storage_errors(pattern, "list"):
        filesystem, path = open_filesystem(pattern)
        found = filesystem.glob(path, detail=True)
        sizes = {name: entry["size"] for name, entry in sorted(found.items()) if entry["type"] == "file"}
    return {filesystem.unstrip_protocol(name): size for name, size in sizes.items()}


def list_names(location: Location) -> list[str]:
    """The sorted names of files and directories directly below `location`; empty if nothing exists there.

    Every call asks the server. Some S3 servers still list a directory for a while after its last object was removed.
    """
    with storage_errors(location, "list"):
        filesystem, path = open_filesystem(location)
        try:
            entries = filesystem.ls(path, detail=False)
        except FileNotFoundError:
            return []
    names = {entry.rstrip("/").removeprefix(path.rstrip("/") + "/") for entry in entries}
    # The listing of a file is the file itself, with its whole path: left out by the "/".
    return sorted(name for name in names if name and "/" not in name)


def fixed_part(location: Location) -> str:
    """The directory before the first wildcard of a pattern ("": the working directory). A plain location as it is."""
    literal, rest = _split(location)
    return literal[:-1] or literal if rest else literal


def _split(location: Location) -> tuple[str, str]:
    """A location in two: what is literal, up to and with the last "/" before the first wildcard; the pattern below it.

    The pattern is empty for a plain location. In a local path, a name that exists is plain, whatever it is made of.
    """
    text, end = os.fspath(location), 0
    for name in text.split("/"):
        if _WILDCARD.search(name) and (is_url(text) or not os.path.lexists(text[:end] + name)):
            return text[:end], text[end:]
        end += len(name) + 1
    return text, ""


def states(location: Location) -> dict[str, tuple[int, str | None]]:
    """The files that match a pattern (see `glob`), or that are below `location`: name → (size in bytes, version).

    Names are relative to the part before the first wildcard. The version of a file at a URL is what the server tells:
    its ETag, generation or time of the last change. It is None for local files, and if the server tells none.
    """
    pattern, root = os.fspath(location), fixed_part(location)
    if not is_url(location):
        paths = glob(pattern) if root != pattern else {}
        if root == pattern:
            below = Path(pattern).rglob("*") if Path(pattern).is_dir() else [Path(pattern)]
            paths = {str(path): path.stat().st_size for path in below if path.is_file()}
        return {os.path.relpath(path, root or "."): (size, None) for path, size in sorted(paths.items())}
    with storage_errors(location, "list"):
        filesystem, path = open_filesystem(location)
        found = filesystem.glob(path, detail=True) if root != pattern else _files(filesystem, path)
        start = filesystem._strip_protocol(root).rstrip("/")
        files = {name: entry for name, entry in sorted(found.items()) if entry.get("type", "file") == "file"}
        return {
            name.removeprefix(f"{start}/") if name != start else ".": (_size(filesystem, name, entry), _version(entry))
            for name, entry in files.items()
        }


def num_bytes(location: Location) -> int:
    """The size of the file, or of all files below `location`, in bytes; 0 if nothing is there. It takes no patterns."""
    with storage_errors(location, "list"):
        filesystem, path = open_filesystem(location)
        return sum(_size(filesystem, name, entry) for name, entry in _files(filesystem, path).items())


def _size(filesystem, name: str, entry: dict) -> int:
    """The size of a file in bytes; some servers tell it only when they are asked for this file."""
    size = entry.get("size")
    return filesystem.size(name) or 0 if size is None else size


def _version(entry: dict) -> str | None:
    fields = ("ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "mtime", "created")
    return next((f"{field} {entry[field]}" for field in fields if entry.get(field)), None)


def versions(location: Location) -> dict[str, tuple]:
    """Every file below `location` by its relative name, with a tuple that changes if the file changes."""
    with storage_errors(location, "list"):
        filesystem, path = open_filesystem(location)
        found = _files(filesystem, path)
    fields = ("size", "ETag", "mtime", "created")  # a file system has only some of them
    prefix = path.rstrip("/") + "/"
    return {
        name.removeprefix(prefix): tuple(str(entry.get(field)) for field in fields)
        for name, entry in found.items()
        if name.startswith(prefix)
    }


def read_bytes(location: Location) -> bytes:
    """The content of a small file."""
    with storage_errors(location, "read"):
        filesystem, path = open_filesystem(location)
        return filesystem.cat_file(path)


def write_bytes(location: Location, data: bytes) -> None:
    """Write a small file and replace an existing one. It appears complete or not at all."""
    with storage_errors(location, "write"):
        if not is_url(location):
            with whole_file(location) as partial:
                partial.write_bytes(data)
            return
        filesystem, path = open_filesystem(location)
        filesystem.pipe_file(path, data)


def create_bytes(location: Location, data: bytes) -> bool:
    """Write a small file unless it exists, complete or not at all. Returns whether it was written.

    On S3 this is one conditional request. A server that ignores the condition overwrites the file.
    """
    try:
        with storage_errors(location, "write"):
            filesystem, path = open_filesystem(location)
            if is_url(location):
                filesystem.pipe_file(path, data, mode="create")
            else:
                create_file(path, data)
    except AlreadyExists:
        return False
    return True


def remove(location: Location) -> None:
    """Remove a file, or a directory with all files below it; does nothing if nothing exists there.

    Raises StorageError for a whole bucket, and if the server kept some of the files.
    """
    with storage_errors(location, "remove"):
        filesystem, path = open_filesystem(location)
        if is_url(location) and "/" not in path.strip("/"):
            raise StorageError(f"{location}: names a whole bucket, which is never removed; name a path inside it")
        if files := _files(filesystem, path):
            filesystem.rm(list(files))
            if _files(filesystem, path):  # s3fs does not report objects that the server kept
                raise StorageError(f"{location}: some files were not removed; the credentials may not allow it")
        if not is_url(location) and Path(location).is_dir():
            shutil.rmtree(location)


@contextmanager
def open_binary(location: Location, block_bytes: int = BLOCK_BYTES) -> Iterator[io.BufferedReader]:
    """Open a file for reading. It is seekable, and only blocks of it are in memory.

    For a URL, a block is requested when it is needed. A read of more than `block_bytes` is one request. Choose small
    blocks for a reader that jumps and knows how much it needs.
    """
    if not is_url(location):
        with open(location, "rb") as file:
            yield file
        return
    with storage_errors(location, "read"):
        filesystem, path = open_filesystem(location)
        file = filesystem.open(path, "rb", block_size=block_bytes, cache_type="none")
    with file, BlockReader(RemoteFile(file, location), block_bytes) as reader:
        yield reader


def upload(source: Path, location: Location) -> None:
    """Copy a local file to `location`, a large one in parts. On S3 it appears complete or not at all."""
    size = Path(source).stat().st_size
    with storage_errors(location, "write"):
        filesystem, path = open_filesystem(location)
        part_bytes = max(_PART_BYTES, -(-size // _MOST_PARTS))
        parts = {"chunksize": part_bytes} if scheme_of(location) in S3_SCHEMES else {}
        try:
            filesystem.put_file(str(source), path, **parts)
        except FileNotFoundError:
            # The server was away for a while. It no longer knows the id of the upload, because it has already joined
            # the parts or has lost them. So upload the file again.
            filesystem.put_file(str(source), path, **parts)
        if (found := filesystem.info(path)["size"]) != size:
            raise StorageError(f"{location}: has {found} bytes, but {source}, which was copied to it, has {size}")


def download(location: Location, target: Path) -> None:
    """Copy `location` to a local file, which appears complete or not at all."""
    with whole_file(target) as partial, open_binary(location) as file, open(partial, "wb") as copy:
        shutil.copyfileobj(file, copy, BLOCK_BYTES)


def check_access(location: Location, writing: bool) -> None:
    """Raise StorageError within seconds if `location` cannot be used; the text says what to change and where.

    A location to read may be a pattern: the part before its first wildcard is checked. The path need not exist yet, but
    its bucket must. With `writing`, a small object is written below the path and removed again.
    """
    with storage_errors(location, "write to" if writing else "read"):
        filesystem, path = open_filesystem(location, patient=False)
        if not writing:
            path = _WILDCARD.split(path)[0]
        if scheme_of(location) in S3_SCHEMES:  # listing one object distinguishes a missing bucket from an empty one
            bucket, key, _ = filesystem.split_path(path)
            filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
        elif not writing:
            filesystem.exists(path)
        if writing:
            probe = f"{path.rstrip('/')}/.access-{secrets.token_hex(8)}"
            filesystem.pipe_file(probe, b"-")
            filesystem.rm_file(probe)


def _files(filesystem, path: str) -> dict[str, dict]:
    """All files at or below `path`: full path → the file system's information about it."""
    found = filesystem.find(path, detail=True)
    # `find` of an empty directory returns the directory itself.
    return {name: entry for name, entry in found.items() if entry.get("type", "file") == "file"}
