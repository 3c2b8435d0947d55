"""Checkpoints of a training run, by torch.distributed.checkpoint: whole or not at all, verified, the last few kept.

Every rank writes its own shards while training goes on, and the sums of its files; rank 0 adds the manifest and
renames the directory. Under a URL nothing can be renamed: there a checkpoint without a manifest does not count, and
the manifest is written last. ::

    step-00000100/  manifest.json       step, progress of the run, bytes and sha256 of every file
                    .metadata           which tensor is where, in torch's format
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
from elastic_core.io.digests import file_digest
from elastic_core.training.distributed.ranks import Ranks

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SUMS = "sums.json"  # a rank's own part of the manifest, as long as the checkpoint is being written


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read. Every rank raises it at the same point of the run."""


class CheckpointUnavailable(CheckpointError):
    """One whose storage server did not answer for as long as it was waited for; later it may."""


class Checkpoints:
    """The checkpoints of one run in a directory, or under a URL; `keep` of them stay.

    Several ranks call every method together. Saving goes on in the background: `save` returns when the tensors have
    been copied, and raises what went wrong with the save before; `wait` ends the last one.
    """

    def __init__(self, location: str | os.PathLike, keep: int = 2, ranks: Ranks | None = None):
        self.location = location if storage.is_url(location) else str(Path(location).absolute())
        self.keep, self.ranks = keep, ranks or Ranks()
        # A group of its own: its messages must not mix with those of the training that goes on meanwhile.
        self._group = self.ranks.new_group()
        self._pending: tuple[int, Future] | None = None

    def save(self, step: int, tensors: dict[str, Tensor], progress: dict) -> None:
        """Begin to write `tensors` (whole or sharded) and `progress` (JSON values) as the checkpoint of `step`.

        Those of this step or later ones were passed over as damaged, or the run would stand there: they are dropped.
        """
        self.wait()
        writer = _Writer(self.location, step, progress, self.keep)
        alone = not self.ranks.is_distributed
        future = dcp.async_save({"run": tensors}, storage_writer=writer, process_group=self._group, no_dist=alone)
        self._pending = step, future

    def wait(self) -> None:
        """Return when nothing is being written; raise CheckpointError where the last save failed."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except (CheckpointException, OSError) as error:
            if self.ranks.rank == 0 and not storage.is_url(self.location):
                shutil.rmtree(_partial(self.location, step), ignore_errors=True)
            raise _kind(error)(
                f"the checkpoint of step {step} could not be written to {self.location}: {_root_cause(error)}. The "
                "checkpoint before it is intact: mend this (make space, for instance) and start again to go on from it"
            ) from error

    def load_newest(self, tensors: dict[str, Tensor]) -> dict | None:
        """Fill `tensors` in place from the newest intact checkpoint and return its progress; None where there is none.

        A damaged one is passed over with a warning. The number of ranks may differ from the one that wrote it.
        """
        for name in self.ranks.from_first(lambda: sorted(_names(self.location), reverse=True)):
            with _local(self.location, name, self.ranks) as directory:
                problem, manifest = self._verify(directory)
                if problem is None:
                    reader = dcp.FileSystemReader(directory)
                    alone = not self.ranks.is_distributed
                    try:
                        dcp.load({"run": tensors}, storage_reader=reader, process_group=self._group, no_dist=alone)
                    except CheckpointException as error:  # intact, and yet of another model
                        where = storage.join(self.location, name)
                        raise CheckpointError(f"{where} could not be read: {_root_cause(error)}") from error
                    self.ranks.barrier()  # nobody drops a downloaded one that others still read
                    return manifest["progress"]
            if self.ranks.rank == 0:
                where = storage.join(self.location, name)
                logger.warning("checkpoint %s is damaged (%s); trying the one before", where, problem)
        return None

    def _verify(self, directory: Path) -> tuple[str | None, dict | None]:
        """What is wrong with a checkpoint, if anything, and its manifest; the ranks share the reading."""
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
    """A checkpoint's manifest; ValueError where its own checksum does not match."""
    content = json.loads((directory / MANIFEST).read_text())
    if content.pop("sha256") != _digest(content):
        raise UserError(f"the checksum of {MANIFEST} does not match")
    return content


class _Writer(dcp.FileSystemWriter):
    """torch's writer of files, with sums, a manifest, and one moment at which the checkpoint is there."""

    def __init__(self, location: str, step: int, progress: dict, keep: int):
        self.location, self.step, self.progress, self.keep = location, step, progress, keep
        self.is_remote = storage.is_url(location)
        super().__init__(_staging(location, "save") if self.is_remote else _partial(location, step))

    def set_up_storage_writer(self, is_coordinator: bool, *args, **kwargs) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if is_coordinator:  # before any other rank writes: it waits for the coordinator's plan
            for name in _listed(self.location):
                if name >= _name(self.step):
                    _remove(self.location, name)
            if not self.is_remote:
                for left in Path(self.location).glob(".step-*"):  # by a killed process
                    shutil.rmtree(left, ignore_errors=True)

    def write_data(self, plan, planner):
        try:
            result = super().write_data(plan, planner)
        except RuntimeError as error:
            # torch's zip writer, closing what a full disk cut short, raises a riddle while it handles the disk's error.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        directory, prefix = Path(self.path), plan.storage_data.prefix
        sums = {path.name: _entry(path) for path in directory.glob(f"{prefix}*.distcp")}
        (directory / f"{prefix}{SUMS}").write_text(json.dumps(sums))
        if self.is_remote:
            for name in (*sums, f"{prefix}{SUMS}"):
                storage.upload(directory / name, self._url(name))
                (directory / name).unlink()
        return result

    def finish(self, metadata, results) -> None:
        super().finish(metadata, results)
        directory = Path(self.path)
        if self.is_remote:
            for left in directory.glob(f"*{SUMS}"):  # a killed run's: ours are up there
                left.unlink()
            for name in storage.list_names(self._url()):
                if name.endswith(SUMS):
                    storage.download(self._url(name), directory / name)
        files = {".metadata": _entry(directory / ".metadata")}
        for path in directory.glob(f"*{SUMS}"):
            files |= json.loads(path.read_text())
            path.unlink()
        written = {result.storage_data.relative_path for part in results for result in part}
        if missing := sorted(written - files.keys()):
            raise OSError(f"{missing[0]}, which another worker wrote, is not there; all need to see the same place")
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
def _local(location: str, name: str, ranks: Ranks) -> Iterator[Path]:
    """A checkpoint as a local directory: itself, or downloaded once per node and dropped afterwards."""
    if not storage.is_url(location):
        yield Path(location) / name
        return
    directory, problem = _staging(location, "resume"), None
    leads = ranks.leads_node()
    if leads:
        try:
            _download(storage.join(location, name), directory)
        except (storage.StorageError, OSError) as error:
            problem = error
    found = [problem for problem in ranks.gather(problem) if problem is not None]
    if found:  # out of reach, not damaged: an older one must not be taken for the newest
        raise _kind(found[0])(f"the checkpoint {storage.join(location, name)} could not be read: {found[0]}")
    try:
        yield directory
    finally:
        if leads:
            shutil.rmtree(directory, ignore_errors=True)


def _download(url: str, directory: Path) -> None:
    """Copy what there is of a checkpoint; whether it is all there shows when it is verified."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    names = storage.list_names(url)
    if MANIFEST not in names:
        return
    storage.download(storage.join(url, MANIFEST), directory / MANIFEST)
    with suppress(ValueError, KeyError):  # a damaged manifest
        names = [name for name in read_manifest(directory)["files"] if name in names]
    storage.download_files(url, names, directory)


def _staging(location: str, what: str) -> Path:
    """Where files on their way to or from `location` lie on this node; a killed run's are overwritten by the next."""
    digest = hashlib.sha256(location.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"elastic-checkpoints-{digest}" / what


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _partial(location: str, step: int) -> Path:
    return Path(location) / f".{_name(step)}.partial"


def _names(location: str) -> list[str]:
    """The checkpoints at a location, whole or damaged; under a URL one without a manifest is none."""
    if storage.is_url(location):
        return [name for name in _listed(location) if storage.exists(storage.join(location, name, MANIFEST))]
    return _listed(location)


def _listed(location: str) -> list[str]:
    """Everything of that kind; S3 servers may go on listing a directory for a while after its last file is gone."""
    if storage.is_url(location):
        return [name for name in storage.list_names(location) if name.startswith("step-")]
    return [path.name for path in Path(location).glob("step-*")]


def _remove(location: str, name: str) -> None:
    """Drop a checkpoint so that at no moment a part of it looks whole."""
    if storage.is_url(location):
        storage.remove(storage.join(location, name, MANIFEST))
        storage.remove(storage.join(location, name))
        return
    aside = Path(location) / f".{name}.dropped"
    os.replace(Path(location) / name, aside)
    shutil.rmtree(aside)


def _entry(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _kind(error: BaseException) -> type[CheckpointError]:
    """As what to raise an error of storage, by what happened on the first rank that had one."""
    if isinstance(error, CheckpointException):
        cause, _ = next(iter(error.failures.values()))
        return _kind(cause)
    return CheckpointUnavailable if isinstance(error, storage.StorageUnavailable) else CheckpointError


def _root_cause(error: BaseException) -> str:
    """The message of what really went wrong, of whichever rank."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_root_cause(cause)}"
    return str(error) or type(error).__name__
