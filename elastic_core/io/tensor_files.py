"""Read and write safetensors files in blocks of rows, so memory holds only a few blocks of even the largest tensor.

A safetensors file is a header with the offset of each tensor, followed by the tensors' bytes. All shapes are known
before the first value, so the header is written first and the tensors follow in any order. The files are byte for
byte equal to those of the safetensors library.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elastic_core.errors import UserError
from elastic_core.io.filesystem import Location
from elastic_core.io.ordered_map import ordered_map
from elastic_core.io.tensor_headers import read_raw_header

BLOCK_BYTES = 1 << 21  # large enough for efficient writes, small enough for the cache of a CPU core
WRITERS = 2  # threads: while one waits for the disk, the other computes the next block
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}  # in the order in which the safetensors library sorts tensors in a file
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


@dataclass(frozen=True)
class Entry:
    """The element type and shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Rows(Protocol):
    """Gives rows [start, stop) of a tensor, computed when they are needed. Called by several threads at once."""

    def __getitem__(self, rows: slice) -> Tensor: ...


@dataclass(frozen=True)
class Stored:
    """The position of a tensor in a file."""

    path: Location
    entry: Entry
    offset: int  # of its first byte, from the start of the file

    def read(self, runs: list[tuple[int, int]]) -> np.ndarray:
        """Read the rows [start, stop) of each of the `runs` and concatenate them.

        The elements are unsigned integers with as many bytes as the tensor's elements, because numpy has no bfloat16.
        """
        num_rows, row_bytes = sum(stop - start for start, stop in runs), self.entry.row_bytes
        raw, done = np.empty(num_rows * row_bytes, np.uint8), 0
        with open(self.path, "rb", buffering=0) as file:
            for start, stop in runs:
                part = raw[done : done + (stop - start) * row_bytes]
                file.seek(self.offset + start * row_bytes)
                if file.readinto(part) != len(part):
                    raise OSError(f"{self.path}: was truncated while it was read")
                done += len(part)
        return raw.view(f"u{self.entry.dtype.itemsize}").reshape(num_rows, *self.entry.shape[1:])


def open_checked(path: Path):
    """Open a safetensors file. Raises UserError with the path and the reason if the file is missing or damaged."""
    try:
        return safe_open(path, "pt")
    except (FileNotFoundError, SafetensorError) as error:
        read_raw_header(path)  # raises the exact reason
        raise UserError(f"{path}: is not a safetensors file ({error}); copy it again") from error


def read_header(path: Location) -> dict[str, Stored]:
    """The position of every tensor of a file, by name. The file may be at a URL; only its header is read.

    Raises UserError for a missing or damaged file, and for an element type that is not floating point.
    """
    header, first = read_raw_header(path)
    stored = {}
    for name, values in header.items():
        if values["dtype"] not in _DTYPES:
            raise UserError(f"{path}: {name} is stored as {values['dtype']}; allowed: {', '.join(_DTYPES)}")
        entry = Entry(_DTYPES[values["dtype"]], tuple(values["shape"]))
        stored[name] = Stored(path, entry, first + values["data_offsets"][0])
    return stored


class TensorFile:
    """A new safetensors file. The constructor writes the header; `write` fills in rows in any order.

    Raises FileExistsError if the file exists.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry]):
        self.path, self.entries, self._offsets = path, entries, {}
        header, end = {"__metadata__": {"format": "pt"}}, 0
        order = list(_CODES)
        for name, entry in sorted(entries.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
            self._offsets[name], end = end, end + entry.num_bytes
            offsets = [self._offsets[name], end]
            header[name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # the library aligns the first tensor to 8 bytes
        self._start, self._lock = 8 + len(text), Lock()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._write(len(text).to_bytes(8, "little") + text, 0)
        os.ftruncate(self._file, self._start + end)

    def write(self, name: str, start: int, rows: Tensor) -> None:
        """Write rows [start, start + len(rows)) of a tensor. Several threads may call this at the same time."""
        entry = self.entries[name]
        assert rows.dtype == entry.dtype and rows.shape[1:] == entry.shape[1:], name
        data = rows.contiguous().flatten().view(torch.uint8).numpy()
        self._write(data, self._start + self._offsets[name] + start * entry.row_bytes)

    def _write(self, data, offset: int) -> None:
        view = memoryview(data)
        try:
            # The kernel allows one write to a file at a time. A second thread would spend CPU time waiting in it.
            with self._lock:
                while view:
                    written = os.pwrite(self._file, view, offset)
                    view, offset = view[written:], offset + written
        except OSError as error:  # such as a full disk; name the file, which pwrite does not know
            raise OSError(error.errno, os.strerror(error.errno), str(self.path)) from None

    def close(self) -> None:
        os.close(self._file)


def write(files: Mapping[Path, Mapping[str, Entry]], tensors: Iterable[tuple[str, Rows]]) -> None:
    """Write safetensors files with the given entries, and fill them with `tensors`, which come in any order.

    `tensors` has (name, rows) for every entry of all files, each once. It is an iterator that is advanced only when
    threads are free. The previous tensor may still be in use when the next one is requested.
    """
    with ExitStack() as stack:
        owners: dict[str, TensorFile] = {}
        for path, entries in files.items():
            file = TensorFile(path, entries)
            stack.callback(file.close)
            owners |= dict.fromkeys(entries, file)
        for _ in ordered_map(_copy, _blocks(owners, tensors), WRITERS):
            pass


def save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write small tensors to a file, with the permissions of every new file.

    The library's own function would write a file that only its owner can read.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata)
    path.chmod(mode)


def _blocks(owners: dict[str, TensorFile], tensors: Iterable[tuple[str, Rows]]) -> Iterator[tuple]:
    """All tensors in blocks of rows: (file, tensor name, rows, start, stop)."""
    missing = set(owners)
    for name, rows in tensors:
        assert name in missing, f"{name}: written twice, or without an entry"
        missing.remove(name)
        entry = owners[name].entries[name]
        step = max(1, BLOCK_BYTES // max(1, entry.row_bytes))
        for start in range(0, entry.shape[0], step):
            yield owners[name], name, rows, start, min(start + step, entry.shape[0])
    assert not missing, f"tensors without contents: {sorted(missing)[:5]}"


def _copy(block: tuple) -> None:
    file, name, rows, start, stop = block
    file.write(name, start, rows[start:stop])
