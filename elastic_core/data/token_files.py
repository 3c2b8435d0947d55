"""The data directory: what is in it, and how it is written.

For every source (`prose`, `code`, ...) and split (`train`, `held_out`)::

    manifest.json                    what there is, and for which tokenizer: see Manifest
    <source>.<split>.tokens.npy      every document's tokens, one after another; each document ends with eos
    <source>.<split>.offsets.npy     where documents start, int64, one more entry than documents
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SPLITS = ("train", "held_out")


@dataclasses.dataclass(frozen=True)
class Split:
    """One source's share of one split: file names in the data directory, and sizes.

    `num_tokens` counts every document's eos (and bos, where there is one); `num_bytes` is the text alone, in UTF-8.
    """

    tokens: str
    offsets: str
    num_tokens: int
    num_bytes: int
    num_documents: int


@dataclasses.dataclass(frozen=True)
class Source:
    """One source. `whole_documents`: its documents must never be cut or joined with half of another."""

    whole_documents: bool
    splits: dict[str, Split]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What manifest.json holds.

    `bos_token_id` is the token that every document starts with. Where it is the eos token itself, the previous
    document's end serves, and only sequences that start with a document carry it. Null: documents start bare.
    `tokenizer_sha256` is `vocabulary_sha256` of the tokenizer that wrote the tokens.
    """

    vocab_size: int
    eos_token_id: int
    bos_token_id: int | None
    tokenizer_sha256: str
    sources: dict[str, Source]

    @property
    def dtype(self) -> np.dtype:
        """The type of a token on disk: two bytes where the vocabulary allows it."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def write(self, directory: str | Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2)
        (Path(directory) / "manifest.json").write_text(text + "\n", encoding="utf-8")


class SplitWriter:
    """Appends documents to the two files of one split; memory does not grow with the corpus."""

    def __init__(self, directory: str | Path, source: str, split: str, dtype: np.dtype):
        stem = f"{source}.{split}"
        self._tokens = _ArrayWriter(Path(directory) / f"{stem}.tokens.npy", dtype)
        self._offsets = _ArrayWriter(Path(directory) / f"{stem}.offsets.npy", np.dtype(np.int64))
        self._offsets.append([0])
        self._num_bytes = 0

    def append(self, documents: Sequence[Sequence[int] | np.ndarray], num_bytes: int) -> None:
        """Add documents (token ids, eos included) whose texts have `num_bytes` bytes of UTF-8 together."""
        ends = self._tokens.size + np.cumsum([len(ids) for ids in documents], dtype=np.int64)
        self._offsets.append(ends)
        for ids in documents:
            self._tokens.append(ids)
        self._num_bytes += num_bytes

    def close(self) -> Split:
        """Finish the files. The split may not be read before."""
        self._tokens.close()
        self._offsets.close()
        names = self._tokens.path.name, self._offsets.path.name
        return Split(*names, self._tokens.size, self._num_bytes, self._offsets.size - 1)


class _ArrayWriter:
    """A one-dimensional .npy file that grows; numpy leaves room in the header for the final length."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self.size = path, 0
        self._dtype = dtype
        self._file = path.open("wb")
        self._write_header()

    def append(self, values) -> None:
        array = np.asarray(values, dtype=self._dtype)
        self._file.write(array.tobytes())
        self.size += len(array)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self.size,)}
        np.lib.format.write_array_header_1_0(self._file, header)
