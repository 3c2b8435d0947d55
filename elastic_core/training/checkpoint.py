"""Checkpoints of a training run, written by torch.distributed.checkpoint.

A checkpoint is complete or it does not exist. It is verified by checksums when it is read. The newest few are kept.

Every rank writes its own shards, and a list of their checksums, while training continues. Then rank 0 writes the
manifest and renames the directory to its final name. Under a URL, a directory cannot be renamed. There the manifest is
written last, and a checkpoint without a manifest does not count. ::

    step-00000100/  manifest.json       step, progress of the run, size in bytes and sha256 of every file
                    .metadata           which file holds which tensor, in torch's format
                    __0_0.distcp …      the shards
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from elastic_core.errors import UserError
from elastic_core.io import storage
from elastic_core.io.directory_transfer import download_files
from elastic_core.io.fingerprints import file_digest
from elastic_core.training.distributed.ranks import Ranks

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SUMS = "sums.json"  # a rank's part of the manifest; it exists only while the checkpoint is being written


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read. Every rank raises this at the same point of the run."""


class CheckpointUnavailable(CheckpointError):
    """The storage server did not answer within the time limit. A later start may succeed."""


class Checkpoints:
    """The checkpoints of one run, in a directory or under a URL. The newest `keep` of them are kept.

    All ranks have to call every method together. Saving runs in the background: `save` returns as soon as the tensors
    have been copied. If it fails, the next `save` or `wait` raises the error.
    """

    def __init__(self, location: str | os.PathLike, keep: int = 2, ranks: Ranks | None = None):
        self.location = location if storage.is_url(location) else str(Path(location).absolute())
        self.keep, self.ranks = keep, ranks or Ranks()
        # A separate process group: its messages must not mix with those of the training that continues meanwhile.
        self._group = self.ranks.new_group()
        self._pending: tuple[int, Future] | None = None

    def save(self, step: int, tensors: dict[str, Tensor], progress: dict) -> None:
        """Start to write `tensors` (whole or sharded) and `progress` (JSON values) as the checkpoint of `step`.

        This deletes existing checkpoints of this step and of later steps: they are damaged, because otherwise the run
        would have resumed from them. Raises CheckpointError if the save before has failed.
        """
        self.wait()
        writer = _Writer(self.location, step, progress, self.keep)
        no_dist = not self.ranks.is_distributed
        future = dcp.async_save({"run": tensors}, storage_writer=writer, process_group=self._group, no_dist=no_dist)
        self._pending = step, future

    def wait(self) -> None:
        """Wait until nothing is being written. Raises CheckpointError if the last save has failed."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except (CheckpointException, OSError) as error:
            if self.ranks.rank == 0 and not storage.is_url(self.location):
                shutil.rmtree(_partial_directory(self.location, step), ignore_errors=True)
            raise _error_type(error)(
                f"the checkpoint of step {step} could not be written to {self.location}: {_root_cause(error)}. The "
                "checkpoint before it is intact: fix this (make space, for instance) and start again to resume from it"
            ) from error

    def load_newest(self, tensors: dict[str, Tensor]) -> dict | None:
        """Fill `tensors` in place from the newest intact checkpoint and return its progress, or None if there is none.

        A damaged checkpoint is skipped with a warning. The number of ranks may differ from that of the run that wrote
        it. Raises CheckpointError if a checkpoint cannot be reached, or if it is that of another model.
        """
        for name in self.ranks.from_first(lambda: sorted(_names(self.location), reverse=True)):
            with _local_directory(self.location, name, self.ranks) as directory:
                problem, manifest = self._verify(directory)
                if problem is None:
                    reader = dcp.FileSystemReader(directory)
                    no_dist = not self.ranks.is_distributed
                    try:
                        dcp.load({"run": tensors}, storage_reader=reader, process_group=self._group, no_dist=no_dist)
                    except CheckpointException as error:  # The checkpoint is intact, but it is that of another model.
                        where = storage.join(self.location, name)
                        raise CheckpointError(f"{where} could not be read: {_root_cause(error)}") from error
                    self.ranks.barrier()  # No rank may delete a downloaded checkpoint that others still read.
                    return manifest["progress"]
            if self.ranks.rank == 0:
                where = storage.join(self.location, name)
                logger.warning("checkpoint %s is damaged (%s); trying the one before it", where, problem)
        return None

    def _verify(self, directory: Path) -> tuple[str | None, dict | None]:
        """(what is wrong with a checkpoint or None, its manifest). Each rank verifies a part of the files."""
        manifest, problem = None, None
        try:
            manifest = read_manifest(directory)
            for name in sorted(manifest["files"])[self.ranks.rank :: self.ranks.world]:
                entry, path = manifest["files"][name], directory / name
                if path.stat().st_size != entry["bytes"]:
                    raise UserError(f"{name} has {path.stat().st_size} bytes, should have {entry['bytes']}")
                if file_digest(path) != entry["sha256"]:
                    raise UserError(f"the checksum of {name} does not match")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = str(error)
        found = [problem for problem in self.ranks.gather(problem) if problem is not None]
        return (found[0] if found else None), manifest


def read_manifest(directory: Path) -> dict:
    """The manifest of a checkpoint. Raises UserError if the manifest's own checksum does not match."""
    content = json.loads((directory / MANIFEST).read_text())
    if content.pop("sha256") != _digest(content):
        raise UserError(f"the checksum of {MANIFEST} does not match")
    return content


class _Writer(dcp.FileSystemWriter):
    """torch's file writer, with checksums and a manifest. The checkpoint appears at one moment, when it is complete."""

    def __init__(self, location: str, step: int, progress: dict, keep: int):
        self.location, self.step, self.progress, self.keep = location, step, progress, keep
        self.is_remote = storage.is_url(location)
        super().__init__(_staging_directory(location, "save") if self.is_remote else _partial_directory(location, step))

    def set_up_storage_writer(self, is_coordinator: bool, *args, **kwargs) -> None:
        """torch calls this first, on every rank. Rank 0 deletes what killed runs have left."""
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if is_coordinator:  # No other rank writes yet: they wait for the coordinator's plan.
            for name in _listed(self.location):
                if name >= _name(self.step):
                    _remove(self.location, name)
            if not self.is_remote:
                for abandoned in Path(self.location).glob(".step-*"):  # the partial checkpoints of killed processes
                    shutil.rmtree(abandoned, ignore_errors=True)

    def write_data(self, plan, planner):
        """torch calls this on every rank: write the rank's shards and their checksums."""
        try:
            result = super().write_data(plan, planner)
        except RuntimeError as error:
            # On a full disk, closing torch's zip writer raises a RuntimeError that hides the disk's OSError.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        directory, prefix = Path(self.path), plan.storage_data.prefix
        sums = {path.name: _file_entry(path) for path in directory.glob(f"{prefix}*.distcp")}
        (directory / f"{prefix}{SUMS}").write_text(json.dumps(sums))
        if self.is_remote:
            for name in (*sums, f"{prefix}{SUMS}"):
                storage.upload(directory / name, self._url(name))
                (directory / name).unlink()
        return result

    def finish(self, metadata, results) -> None:
        """torch calls this last, on rank 0: write the manifest, complete the checkpoint, delete the oldest ones."""
        super().finish(metadata, results)
        directory = Path(self.path)
        if self.is_remote:
            for abandoned in directory.glob(f"*{SUMS}"):  # those of a killed run; the current ones are under the URL
                abandoned.unlink()
            for name in storage.list_names(self._url()):
                if name.endswith(SUMS):
                    storage.download(self._url(name), directory / name)
        files = {".metadata": _file_entry(directory / ".metadata")}
        for path in directory.glob(f"*{SUMS}"):
            files |= json.loads(path.read_text())
            path.unlink()
        written = {result.storage_data.relative_path for part in results for result in part}
        if missing := sorted(written - files.keys()):
            raise OSError(f"{missing[0]}, which another worker wrote, is missing; all workers need the same storage")
        content = {"step": self.step, "progress": self.progress, "files": files}
        _write_durably(directory / MANIFEST, json.dumps(content | {"sha256": _digest(content)}) + "\n")
        if self.is_remote:
            for name in (".metadata", MANIFEST):
                storage.upload(directory / name, self._url(name))
            shutil.rmtree(directory)
        else:
            os.replace(directory, Path(self.location) / _name(self.step))
        for old in sorted(_names(self.location))[: -self.keep]:
            _remove(self.location, old)

    def _url(self, *name: str) -> str:
        return storage.join(self.location, _name(self.step), *name)


@contextmanager
def _local_directory(location: str, name: str, ranks: Ranks) -> Iterator[Path]:
    """A checkpoint as a local directory. From a URL, it is downloaded once per node and deleted afterwards."""
    if not storage.is_url(location):
        yield Path(location) / name
        return
    directory, problem = _staging_directory(location, "resume"), None
    downloads = ranks.is_first_on_node()
    if downloads:
        try:
            _download(storage.join(location, name), directory)
        except (storage.StorageError, OSError) as error:
            problem = error
    found = [problem for problem in ranks.gather(problem) if problem is not None]
    if found:  # It cannot be reached, but it may be intact. So do not fall back to an older checkpoint.
        raise _error_type(found[0])(f"the checkpoint {storage.join(location, name)} could not be read: {found[0]}")
    try:
        yield directory
    finally:
        if downloads:
            shutil.rmtree(directory, ignore_errors=True)


def _download(url: str, directory: Path) -> None:
    """Copy the files of a checkpoint that exist. `_verify` finds out whether some are missing."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    names = storage.list_names(url)
    if MANIFEST not in names:
        return
    storage.download(storage.join(url, MANIFEST), directory / MANIFEST)
    with suppress(ValueError, KeyError):  # The manifest is damaged: then copy all files.
        names = [name for name in read_manifest(directory)["files"] if name in names]
    download_files(url, names, directory)


def _staging_directory(location: str, what: str) -> Path:
    """The local directory for files that are copied to or from the URL `location`.

    The name depends on the URL only, so a run overwrites the files that a killed run has left.
    """
    digest = hashlib.sha256(location.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"elastic-checkpoints-{digest}" / what


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _partial_directory(location: str, step: int) -> Path:
    return Path(location) / f".{_name(step)}.partial"


def _names(location: str) -> list[str]:
    """The names of the checkpoints at a location, intact or damaged. Under a URL, only those with a manifest count."""
    if storage.is_url(location):
        return [name for name in _listed(location) if storage.exists(storage.join(location, name, MANIFEST))]
    return _listed(location)


def _listed(location: str) -> list[str]:
    """The names of everything that looks like a checkpoint.

    Trap: an S3 server may list a directory for some time after its last file has been deleted.
    """
    if storage.is_url(location):
        return [name for name in storage.list_names(location) if name.startswith("step-")]
    return [path.name for path in Path(location).glob("step-*")]


def _remove(location: str, name: str) -> None:
    """Delete a checkpoint. At no moment does the rest of it look like a complete checkpoint."""
    if storage.is_url(location):
        storage.remove(storage.join(location, name, MANIFEST))
        storage.remove(storage.join(location, name))
        return
    hidden = Path(location) / f".{name}.dropped"
    os.replace(Path(location) / name, hidden)
    shutil.rmtree(hidden)


def _file_entry(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _error_type(error: BaseException) -> type[CheckpointError]:
    """The exception type for a storage error. If several ranks failed, the error of the first one decides."""
    if isinstance(error, CheckpointException):
        cause, _ = next(iter(error.failures.values()))
        return _error_type(cause)
    return CheckpointUnavailable if isinstance(error, storage.StorageUnavailable) else CheckpointError


def _root_cause(error: BaseException) -> str:
    """The message of the original error. If several ranks failed, that of the first one, with its rank."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_root_cause(cause)}"
    return str(error) or type(error).__name__
