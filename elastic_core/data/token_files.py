"""The files of a data directory, and how they are written.

One manifest, and two arrays for every source (`prose`, `code`, ...) and split (`train`, `held_out`)::

    manifest.json                    the sources, their sizes and the tokenizer: see Manifest
    <source>.<split>.tokens.npy      the tokens of all documents, concatenated; each document ends with eos
    <source>.<split>.offsets.npy     the start of every document and the end of the last one, int64
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from elastic_core.config import Require, require

SPLITS = ("train", "held_out")


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of one source: the names of its two files in the data directory, and sizes.

    `num_tokens` includes the eos of every document, and the bos if there is one. `num_bytes` is the size of the text in
    UTF-8, without eos and bos.
    """

    tokens: str
    offsets: str
    num_tokens: int
    num_bytes: int
    num_documents: int

    def check(self, require: Require = require) -> None:
        for name in ("num_tokens", "num_bytes", "num_documents"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")


@dataclasses.dataclass(frozen=True)
class Source:
    """One source. With `whole_documents`, a training sequence holds complete documents only, never a part of one.

    `skipped_rows` is the number of rows of its files that hold no text, by reason: "null" or "empty".
    """

    whole_documents: bool
    splits: dict[str, Split]
    skipped_rows: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Every document starts with `bos_token_id` (None: documents have no bos). If bos and eos are the same token, the eos
    of a document is also the bos of the next one, and the files hold it once. For whole documents, the loader then
    puts it before the first document of each sequence. `tokenizer_sha256` is `vocabulary_sha256` (loader.py) of the
    tokenizer.
    """

    vocab_size: int
    eos_token_id: int
    bos_token_id: int | None
    tokenizer_sha256: str
    sources: dict[str, Source]

    def check(self, require: Require = require) -> None:
        require(bool(self.sources), "sources", self.sources, "one or more")
        for name in ("eos_token_id", "bos_token_id"):
            token, allowed = getattr(self, name), f"0 to {self.vocab_size - 1}, below vocab_size"
            require(token is None or 0 <= token < self.vocab_size, name, token, allowed)

    @property
    def dtype(self) -> np.dtype:
        """The type of a token on disk: uint16 for up to 65,536 tokens in the vocabulary, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def write(self, directory: str | Path) -> None:
        """Write manifest.json."""
        text = json.dumps(dataclasses.asdict(self), indent=2)
        (Path(directory) / "manifest.json").write_text(text + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Written:
    """How much of a split was written: the number of tokens and offsets, and the size of the text in bytes."""

    num_tokens: int = 0
    num_offsets: int = 0
    num_bytes: int = 0


class SplitWriter:
    """Appends documents to the two files of one split. It keeps no tokens in memory.

    `written`: how much an earlier writer had written (see `flush`). What its files hold beyond that is dropped.
    """

    def __init__(self, directory: str | Path, source: str, split: str, dtype: np.dtype, written: Written | None = None):
        stem, start = f"{source}.{split}", written or Written()
        self._tokens = _ArrayWriter(Path(directory) / f"{stem}.tokens.npy", dtype, start.num_tokens)
        self._offsets = _ArrayWriter(Path(directory) / f"{stem}.offsets.npy", np.dtype(np.int64), start.num_offsets)
        self._num_bytes = start.num_bytes
        if written is None:
            self._offsets.append([0])

    def append(self, documents: Sequence[Sequence[int] | np.ndarray], num_bytes: int) -> None:
        """Append documents, each the token ids with eos; `num_bytes` is the size of all their texts in UTF-8."""
        ends = self._tokens.size + np.cumsum([len(ids) for ids in documents], dtype=np.int64)
        self._offsets.append(ends)
        for ids in documents:
            self._tokens.append(ids)
        self._num_bytes += num_bytes

    def flush(self) -> Written:
        """Write everything to the disk, and return how much that is."""
        self._tokens.flush()
        self._offsets.flush()
        return Written(self._tokens.size, self._offsets.size, self._num_bytes)

    def close(self) -> Split:
        """Finish and close the files. They must not be read before."""
        self._tokens.close()
        self._offsets.close()
        names = self._tokens.path.name, self._offsets.path.name
        return Split(*names, self._tokens.size, self._num_bytes, self._offsets.size - 1)


class _ArrayWriter:
    """Appends values to a one-dimensional .npy file.

    The header holds the length, so `close` writes it again. numpy pads the header for lengths of any number of digits.
    With `size` above 0, the first `size` values of an existing file are kept.
    """

    def __init__(self, path: Path, dtype: np.dtype, size: int = 0):
        self.path, self.size = path, size
        self._dtype = dtype
        self._file = path.open("r+b" if size else "wb")
        self._write_header()
        self._file.truncate(self._file.tell() + size * dtype.itemsize)
        self._file.seek(0, os.SEEK_END)

    def append(self, values) -> None:
        array = np.asarray(values, dtype=self._dtype)
        self._file.write(array.tobytes())
        self.size += len(array)

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self.size,)}
        np.lib.format.write_array_header_1_0(self._file, header)
