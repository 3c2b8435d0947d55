"""Read a data directory (see token_files.py), and map the number of a sample to its training sequence.

PackedSequences has no state. The position of a run in its data is one integer, the number of the next sample. So a
resumed run, a run with another batch size and every data-parallel rank read the same sequences.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tokenize import TokenError  # numpy parses the header as Python
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.format import open_memmap

from elastic_core import config
from elastic_core.data.packing import PackedRows, parts_of_documents, schedule
from elastic_core.data.token_files import Manifest, Split
from elastic_core.data.tokenizer import load_tokenizer
from elastic_core.errors import UserError
from elastic_core.io.json_files import read_json

IGNORED_LABEL = -100  # torch's cross_entropy ignores positions with this label


class Batch(NamedTuple):
    """Sequences of tokens, each (B, L) int64.

    A label is the next token of the same document, or IGNORED_LABEL where no token is learnt: in the padding of a row,
    and before tokens that are not trained, such as the prompts of a conversation. `document_ids` counts the documents
    of a row from 0. Padding is one more document, with the number L.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    document_ids: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch with ids and labels on a device. The documents stay in CPU memory, where their lengths are read."""
        return Batch(self.input_ids.to(device), self.labels.to(device), self.document_ids)


class TokenData:
    """A data directory, memory-mapped. The constructor checks every file against the manifest.

    Raises UserError if the directory is not a data directory, or if a file is missing, truncated or of another size.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        path = self.directory / "manifest.json"
        if not path.is_file():
            raise UserError(f"{self.directory}: not a data directory (no manifest.json); make one with prepare_data")
        self.manifest = config.load(Manifest, read_json(path), str(path))
        self._arrays = {
            (name, split): self._open(entry)
            for name, source in self.manifest.sources.items()
            for split, entry in source.splits.items()
        }

    def tokens(self, source: str, split: str) -> np.ndarray:
        """All tokens of one split, (num_tokens,), uint16 or uint32, memory-mapped."""
        return self._arrays[self._key(source, split)][0]

    def offsets(self, source: str, split: str) -> np.ndarray:
        """The start of every document and the end of the last one, (num_documents + 1,), int64, memory-mapped."""
        return self._arrays[self._key(source, split)][1]

    def trained(self, source: str, split: str) -> np.ndarray | None:
        """Whether each token of one split is trained, (num_tokens,), bool, memory-mapped. None: all are."""
        return self._arrays[self._key(source, split)][2]

    def bytes_per_token(self, source: str, split: str) -> float:
        """Bytes of UTF-8 text per token. A loss in nats per token, divided by ln 2 and by this, is in bits per byte."""
        self._key(source, split)
        entry = self.manifest.sources[source].splits[split]
        return entry.num_bytes / entry.num_tokens

    def _key(self, source: str, split: str) -> tuple[str, str]:
        if (source, split) not in self._arrays:
            allowed = ", ".join(f"{name}/{part}" for name, part in self._arrays)
            raise UserError(f"{self.directory}: has no data {source}/{split}; allowed: {allowed}")
        return source, split

    def _open(self, entry: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        tokens = self._map(entry.tokens, entry.num_tokens, self.manifest.dtype)
        offsets = self._map(entry.offsets, entry.num_documents + 1, np.dtype(np.int64))
        trained = None if entry.trained is None else self._map(entry.trained, entry.num_tokens, np.dtype(bool))
        ascending = bool((offsets[:-1] < offsets[1:]).all())  # no document is empty
        if offsets[0] != 0 or offsets[-1] != entry.num_tokens or not ascending:
            raise UserError(f"{self.directory / entry.offsets}: does not fit {entry.tokens}; run prepare_data again")
        return tokens, offsets, trained

    def _map(self, name: str, size: int, dtype: np.dtype) -> np.ndarray:
        path = self.directory / name
        try:
            array = open_memmap(path, mode="r")
        except (OSError, EOFError, ValueError, SyntaxError, TokenError) as error:
            raise UserError(f"{path}: missing, truncated or not an array ({error}); run prepare_data again") from None
        if array.shape != (size,) or array.dtype != dtype:
            found = f"{array.dtype} {array.shape}"
            raise UserError(f"{path}: holds {found}, the manifest says {dtype} ({size},); run prepare_data again")
        return array


class PackedSequences:
    """A map without state or end from sample numbers 0, 1, 2, ... to training sequences.

    - `mixture` gives the share of each source; shares need not sum to 1. After any number of samples, the number from
      each source differs from its share by less than 1.
    - Each epoch of a source has every sequence once, in a random order that depends on (seed, source, epoch).
    - Documents are shuffled by the seed and packed into sequences whole. A document that is longer than a sequence is
      split, truncated or dropped, as its source says (`too_long`). A label is never in another document than its input.

    Raises UserError for an unknown source, for shares that are negative or all zero, and for a source without a
    document that fits into a sequence.
    """

    def __init__(self, data: TokenData, mixture: Mapping[str, float], sequence_length: int, seed: int):
        shares = _positive_shares(mixture, data)
        if sequence_length < 1:
            raise UserError(f"sequence_length: got {sequence_length}; allowed: 1 or more")
        self.sequence_length = sequence_length
        self.sources = tuple(shares)
        self._seed = seed
        self._data = data
        self._rows = [self._packed(name) for name in self.sources]
        self._schedule = schedule(list(shares.values()))
        self._counts = np.bincount(self._schedule, minlength=len(self.sources))
        # For every turn of the schedule: how many earlier turns of the period its source has had.
        hits = self._schedule[:, None] == np.arange(len(self.sources))
        self._earlier = (np.cumsum(hits, axis=0) - hits)[np.arange(len(hits)), self._schedule]
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def source_indices(self, first: int, count: int) -> np.ndarray:
        """The index in `sources` of the source of each sample from `first` on, (count,), int64."""
        return self._schedule[np.arange(first, first + count) % len(self._schedule)]

    def batch(self, first: int, count: int) -> Batch:
        """Samples `first` to `first + count - 1`, each tensor (count, L)."""
        return self.batch_of_rows(self.rows(first, count))

    def rows(self, first: int, count: int) -> list[tuple[int, int]]:
        """(index of the source in `sources`, number of its row) of each sample. An epoch has every row once."""
        samples = np.arange(first, first + count)
        sources = self.source_indices(first, count)
        turns = samples // len(self._schedule) * self._counts[sources]
        turns += self._earlier[samples % len(self._schedule)]
        return [(int(s), self._shuffled_row(int(s), int(turn))) for s, turn in zip(sources, turns, strict=True)]

    def batch_of_rows(self, rows: list[tuple[int, int]]) -> Batch:
        """The sequences of rows as `rows` gives them, each tensor (number of rows, L)."""
        picks = [(self.sources[s], self._rows[s].parts(row)) for s, row in rows]
        return _read_batch(self._data, "train", picks, self.sequence_length)

    def _packed(self, source: str) -> PackedRows:
        starts, lengths = _parts(self._data, source, "train", self.sequence_length)
        order = np.random.default_rng([self._seed, _number(source)]).permutation(len(starts))
        return PackedRows(starts[order], lengths[order], self.sequence_length)

    def _shuffled_row(self, source: int, turn: int) -> int:
        """The row of the source that is read at its turn number `turn`, counted from the first sample."""
        epoch, position = divmod(turn, len(self._rows[source]))
        if self._orders.get(source, (None,))[0] != epoch:  # a cache, not state: the same order is computed again
            name = _number(self.sources[source])
            order = np.random.default_rng([self._seed, name, epoch]).permutation(len(self._rows[source]))
            self._orders[source] = epoch, order
        return int(self._orders[source][1][position])


def mean_document_length(data: TokenData, mixture: Mapping[str, float], sequence_length: int) -> float:
    """The mean length, in positions, of the documents in packed sequences; a mean over positions: Σl²/Σl.

    A document counts with its part, if it is longer than a sequence. Sources count with their share of the sequences.
    Padding counts as documents of this length. No tokens are read. Raises UserError as `PackedSequences` does.
    """
    shares, total = _positive_shares(mixture, data), 0.0
    for source, share in shares.items():
        lengths = _parts(data, source, "train", sequence_length)[1].astype(np.float64)
        total += share * float(np.square(lengths).sum() / lengths.sum())
    return total / sum(shares.values())


def held_out_batches(
    data: TokenData, source: str, sequence_length: int, batch_size: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """The held-out documents of one source, each alone in a row and padded at its end: (batch_size or fewer, L).

    L is the length of the longest in the batch, at most `sequence_length`. Any causal model therefore computes each
    document by itself. Longer documents are split, truncated or dropped, as in training.
    Stops when the rows have `max_tokens` positions or more without padding (None: reads everything). Documents of
    similar length share a batch.
    Raises UserError as `PackedSequences` does.
    """
    starts, lengths = _parts(data, source, "held_out", sequence_length)
    if max_tokens is not None:
        num_rows = int(np.searchsorted(np.cumsum(lengths), max_tokens)) + 1
        starts, lengths = starts[:num_rows], lengths[:num_rows]
    order = np.argsort(lengths, kind="stable")
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        picks = [(source, [(int(starts[row]), int(lengths[row]))]) for row in rows]
        yield _read_batch(data, "held_out", picks, int(lengths[rows].max()))


def vocabulary_sha256(tokenizer) -> str:
    """The SHA-256 digest of a transformers tokenizer's vocabulary (all tokens and their ids)."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def check_tokenizer(data: TokenData, tokenizer, vocab_size: int | None = None, owner: str = "the model") -> None:
    """Raise UserError unless `tokenizer` has the vocabulary of `data`, and `vocab_size` is large enough for it.

    `tokenizer` is a tokenizer, a directory with one, or None to check only the size. `vocab_size` is the size of a
    model's embeddings. It may be larger than the tokenizer's vocabulary, because many models pad it. `owner` names the
    model in the message.
    """
    manifest = data.manifest
    advice = f"prepare the data with {owner}'s tokenizer, or take another model"
    if vocab_size is not None and vocab_size < manifest.vocab_size:
        raise UserError(
            f"{data.directory} holds token ids up to {manifest.vocab_size - 1}, but {owner} has a vocabulary of "
            f"{vocab_size}; {advice}"
        )
    if isinstance(tokenizer, (str, Path)):
        owner, tokenizer = f"{owner} ({tokenizer})", load_tokenizer(tokenizer)
    if tokenizer is not None and vocabulary_sha256(tokenizer) != manifest.tokenizer_sha256:
        raise UserError(
            f"{data.directory} was tokenised with another vocabulary ({manifest.vocab_size} tokens, sha256 "
            f"{manifest.tokenizer_sha256[:12]}) than that of {owner} ({len(tokenizer)} tokens, "
            f"{vocabulary_sha256(tokenizer)[:12]}); {advice}"
        )


def _positive_shares(mixture: Mapping[str, float], data: TokenData) -> dict[str, float]:
    """The entries of `mixture` above 0. Raises UserError for an invalid mixture."""
    allowed = ", ".join(data.manifest.sources)
    for name, share in mixture.items():
        if name not in data.manifest.sources:
            raise UserError(f"mixture: unknown source {name!r}; {data.directory} has {allowed}")
        if not 0 <= share < float("inf"):
            raise UserError(f"mixture.{name}: got {share}; allowed: 0 or more")
    if not any(mixture.values()):
        raise UserError(f"mixture: got {dict(mixture)}; at least one source ({allowed}) needs a positive share")
    return {name: share for name, share in mixture.items() if share}


def _number(name: str) -> int:
    """A number of 64 bits that depends on the name alone, for the seed of a random generator."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _parts(data: TokenData, source: str, split: str, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """`parts_of_documents` of one split. Raises UserError if there are none."""
    offsets, too_long = data.offsets(source, split), data.manifest.sources[source].too_long
    starts, lengths = parts_of_documents(offsets, sequence_length, too_long)
    if len(starts) == 0:
        shortest = int(np.diff(offsets).min()) if len(offsets) > 1 else 0
        raise UserError(
            f"{data.directory}, {source}/{split}: no document fits sequence_length {sequence_length}, the shortest has "
            f"{shortest} tokens; raise sequence_length, use shorter documents or another value of too_long"
        )
    return starts, lengths


def _read_batch(
    data: TokenData, split: str, picks: list[tuple[str, list[tuple[int, int]]]], sequence_length: int
) -> Batch:
    """The batch (B, L) of the picked rows, each (source, parts as (first token, number of positions)).

    Raises UserError for token ids beyond the vocabulary, which only a damaged file has.
    """
    shape, manifest = (len(picks), sequence_length), data.manifest
    input_ids, labels = np.full(shape, manifest.eos_token_id), np.full(shape, IGNORED_LABEL)
    document_ids = np.empty(shape, dtype=np.int64)
    for row, (source, parts) in enumerate(picks):
        tokens, trained = data.tokens(source, split), data.trained(source, split)
        end = 0
        for number, (first, length) in enumerate(parts):
            begin, end = end, end + length
            input_ids[row, begin:end] = tokens[first : first + length]
            labels[row, begin:end] = tokens[first + 1 : first + length + 1]
            if trained is not None:
                labels[row, begin:end][~trained[first + 1 : first + length + 1]] = IGNORED_LABEL
            document_ids[row, begin:end] = number
        document_ids[row, end:] = sequence_length
    if (largest := max(input_ids.max(), labels.max())) >= manifest.vocab_size:
        raise UserError(
            f"{data.directory}: holds the token id {largest}, but vocab_size in manifest.json is "
            f"{manifest.vocab_size}, so a file of tokens is damaged; run prepare_data again"
        )
    return Batch(*map(torch.from_numpy, (input_ids, labels, document_ids)))
