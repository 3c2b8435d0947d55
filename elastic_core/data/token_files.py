"""The files of a data directory, and how they are written.

One manifest, and two or three arrays for every source (`prose`, `code`, ...) and split (`train`, `held_out`)::

    manifest.json                    the sources, their sizes and the tokenizer: see Manifest
    <source>.<split>.tokens.npy      the tokens of all documents, concatenated
    <source>.<split>.offsets.npy     the start of every document and the end of the last one, int64
    <source>.<split>.trained.npy     whether a model learns to predict the token, bool; without it: all tokens
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from elastic_core.config import Require, require

SPLITS = ("train", "held_out")
TOO_LONG = ("split", "truncate", "drop")  # what happens to a document that is longer than a training sequence


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of one source: the names of its files in the data directory, and sizes.

    `num_tokens` includes the tokens that start and end a document. `num_bytes` is the size of the text in UTF-8,
    without these. `trained` is None if all tokens are trained; otherwise `num_trained` is the number of those that are.
    """

    tokens: str
    offsets: str
    num_tokens: int
    num_bytes: int
    num_documents: int
    trained: str | None = None
    num_trained: int | None = None

    def check(self, require: Require = require) -> None:
        for name in ("num_tokens", "num_bytes", "num_documents"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")


@dataclasses.dataclass(frozen=True)
class Source:
    """One source.

    `too_long` says what happens to a document that is longer than a training sequence: it is split into parts,
    truncated at its end, or dropped. `skipped_rows` is the number of rows of its files that were left out, by reason,
    such as "null" or "empty". `notes` counts what else one should know of its documents, such as special tokens in
    their text.
    """

    too_long: str
    splits: dict[str, Split]
    skipped_rows: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: dict[str, int] = dataclasses.field(default_factory=dict)

    def check(self, require: Require = require) -> None:
        require(self.too_long in TOO_LONG, "too_long", self.too_long, ", ".join(TOO_LONG))


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    A document of text starts with `bos_token_id` (None: it has no bos) and ends with `eos_token_id`. A conversation
    has the tokens that the chat template writes. `tokenizer_sha256` is `vocabulary_sha256` (loader.py) of the
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
    """How much of a split was written: tokens, offsets, tokens that are trained, and the size of the text in bytes."""

    num_tokens: int = 0
    num_offsets: int = 0
    num_bytes: int = 0
    num_trained: int = 0


class SplitWriter:
    """Appends documents to the files of one split. It keeps no tokens in memory.

    `masked`: whether only a part of the tokens is trained, so that `append` gets masks.
    `written`: how much an earlier writer had written (see `flush`). What its files hold beyond that is dropped.
    """

    def __init__(
        self,
        directory: str | Path,
        source: str,
        split: str,
        dtype: np.dtype,
        written: Written | None = None,
        masked: bool = False,
    ):
        start = written or Written()

        def array(content: str, dtype: np.dtype, size: int) -> _ArrayWriter:
            return _ArrayWriter(Path(directory) / f"{source}.{split}.{content}.npy", dtype, size)

        self._tokens = array("tokens", dtype, start.num_tokens)
        self._offsets = array("offsets", np.dtype(np.int64), start.num_offsets)
        self._trained = array("trained", np.dtype(bool), start.num_tokens) if masked else None
        self._num_bytes, self._num_trained = start.num_bytes, start.num_trained
        if written is None:
            self._offsets.append([0])

    def append(
        self,
        documents: Sequence[Sequence[int] | np.ndarray],
        num_bytes: int,
        trained: Sequence[Sequence[bool] | np.ndarray] | None = None,
    ) -> None:
        """Append documents, each its token ids; `num_bytes` is the size of all their texts in UTF-8.

        `trained`, for each document: whether each token is trained. Needed if and only if the writer is `masked`.
        """
        assert (trained is not None) == (self._trained is not None)
        ends = self._tokens.size + np.cumsum([len(ids) for ids in documents], dtype=np.int64)
        self._offsets.append(ends)
        self._tokens.append(_joined(documents, self._tokens.dtype))
        if trained is not None:
            assert [len(mask) for mask in trained] == [len(ids) for ids in documents]
            mask = _joined(trained, self._trained.dtype)
            self._trained.append(mask)
            self._num_trained += int(np.count_nonzero(mask))
        self._num_bytes += num_bytes

    def flush(self) -> Written:
        """Write everything to the disk, and return how much that is."""
        for array in self._arrays():
            array.flush()
        return Written(self._tokens.size, self._offsets.size, self._num_bytes, self._num_trained)

    def close(self) -> Split:
        """Finish and close the files. They must not be read before."""
        for array in self._arrays():
            array.close()
        mask = (None, None) if self._trained is None else (self._trained.path.name, self._num_trained)
        names = self._tokens.path.name, self._offsets.path.name
        return Split(*names, self._tokens.size, self._num_bytes, self._offsets.size - 1, *mask)

    def _arrays(self) -> list[_ArrayWriter]:
        return [self._tokens, self._offsets] + ([] if self._trained is None else [self._trained])


def _joined(parts: Sequence[Sequence | np.ndarray], dtype: np.dtype) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *(np.asarray(part, dtype=dtype) for part in parts)])


class _ArrayWriter:
    """Appends values to a one-dimensional .npy file.

    The header holds the length, so `close` writes it again. numpy pads the header for lengths of any number of digits.
    With `size` above 0, the first `size` values of an existing file are kept.
    """

    def __init__(self, path: Path, dtype: np.dtype, size: int = 0):
        self.path, self.size, self.dtype = path, size, dtype
        self._file = path.open("r+b" if size else "wb")
        self._write_header()
        self._file.truncate(self._file.tell() + size * dtype.itemsize)
        self._file.seek(0, os.SEEK_END)

    def append(self, values) -> None:
        array = np.asarray(values, dtype=self.dtype)
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
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.size,)}
        np.lib.format.write_array_header_1_0(self._file, header)
