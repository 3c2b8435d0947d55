"""safetensors files, written and read in blocks of rows: memory holds a few blocks, however large a tensor is.

A file is a header that says where each tensor lies, and their bytes. Shapes are known before contents are, so that the
header comes first and the rest is filled in, in any order. Files are byte for byte what safetensors itself writes.
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
from torch import Tensor

from elastic_core.errors import UserError
from elastic_core.io.ordered_map import ordered_map

BLOCK_BYTES = 1 << 21  # some thousand rows at a time, and yet about what a core's cache holds
WRITERS = 2  # threads: while one is in the kernel, the other cuts
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}  # as files sort them
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


@dataclass(frozen=True)
class Entry:
    """What a header says of a tensor, save for the place."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Rows(Protocol):
    """A tensor of which `rows[start:stop]` is asked for, block by block; from several threads."""

    def __getitem__(self, rows: slice) -> Tensor: ...


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    path: Path
    entry: Entry
    offset: int  # of its first byte

    def read(self, runs: list[tuple[int, int]]) -> np.ndarray:
        """The rows of all runs [start, stop), one after another, as unsigned integers of the tensor's width."""
        num_rows, row_bytes = sum(stop - start for start, stop in runs), self.entry.row_bytes
        raw, done = np.empty(num_rows * row_bytes, np.uint8), 0
        with open(self.path, "rb", buffering=0) as file:
            for start, stop in runs:
                part = raw[done : done + (stop - start) * row_bytes]
                file.seek(self.offset + start * row_bytes)
                if file.readinto(part) != len(part):
                    raise OSError(f"{self.path}: was cut short while it was read")
                done += len(part)
        return raw.view(f"u{self.entry.dtype.itemsize}").reshape(num_rows, *self.entry.shape[1:])


def open_checked(path: Path):
    """A safetensors file, or a ValueError that names the one which is missing or broken."""
    try:
        return safe_open(path, "pt")
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{path}: missing, truncated or no safetensors file ({error}); copy it again") from error


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a file, by name; ValueError where the file is missing or broken."""
    with open_checked(path), open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    stored = {}
    for name, values in header.items():
        if values["dtype"] not in _DTYPES:
            raise UserError(f"{path}: {name} is stored as {values['dtype']}; allowed: {', '.join(_DTYPES)}")
        entry = Entry(_DTYPES[values["dtype"]], tuple(values["shape"]))
        stored[name] = Stored(path, entry, 8 + size + values["data_offsets"][0])
    return stored


class TensorFile:
    """A file being written: the header at once, then the tensors' rows as they come."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]):
        self.path, self.entries, self._offsets = path, entries, {}
        header, end = {"__metadata__": {"format": "pt"}}, 0
        order = list(_CODES)
        for name, entry in sorted(entries.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
            self._offsets[name], end = end, end + entry.num_bytes
            offsets = [self._offsets[name], end]
            header[name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._start, self._lock = 8 + len(text), Lock()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._write(len(text).to_bytes(8, "little") + text, 0)
        os.ftruncate(self._file, self._start + end)

    def write(self, name: str, start: int, rows: Tensor) -> None:
        """Write rows [start, start + len(rows)) of a tensor; threads may do so at the same time."""
        entry = self.entries[name]
        assert rows.dtype == entry.dtype and rows.shape[1:] == entry.shape[1:], name
        data = rows.contiguous().flatten().view(torch.uint8).numpy()
        self._write(data, self._start + self._offsets[name] + start * entry.row_bytes)

    def _write(self, data, offset: int) -> None:
        view = memoryview(data)
        try:
            with self._lock:  # the system lets one write at a time into a file, and would have the other thread spin
                while view:
                    written = os.pwrite(self._file, view, offset)
                    view, offset = view[written:], offset + written
        except OSError as error:  # a full disk, for instance
            raise OSError(error.errno, os.strerror(error.errno), str(self.path)) from None

    def close(self) -> None:
        os.close(self._file)


def write(files: Mapping[Path, Mapping[str, Entry]], tensors: Iterable[tuple[str, Rows]]) -> None:
    """Write safetensors files of the given entries, and fill them with the tensors in whatever order those come.

    Of `tensors` no more is asked for than is being written: the one behind may still be in use when the next comes.
    """
    with ExitStack() as stack:
        owners: dict[str, TensorFile] = {}
        for path, entries in files.items():
            file = TensorFile(path, entries)
            stack.callback(file.close)
            owners |= dict.fromkeys(entries, file)
        for _ in ordered_map(_copy, _blocks(owners, tensors), WRITERS):
            pass


def _blocks(owners: dict[str, TensorFile], tensors: Iterable[tuple[str, Rows]]) -> Iterator[tuple]:
    """Every tensor in blocks of rows: where to write, what, from which rows, from where to where."""
    missing = set(owners)
    for name, rows in tensors:
        assert name in missing, f"{name}: written already, or without an entry"
        missing.remove(name)
        entry = owners[name].entries[name]
        step = max(1, BLOCK_BYTES // max(1, entry.row_bytes))
        for start in range(0, entry.shape[0], step):
            yield owners[name], name, rows, start, min(start + step, entry.shape[0])
    assert not missing, f"tensors without contents: {sorted(missing)[:5]}"


def _copy(block: tuple) -> None:
    file, name, rows, start, stop = block
    file.write(name, start, rows[start:stop])
