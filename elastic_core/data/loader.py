"""Reading a data directory (see token_files.py), and the map from a sample's number to a training sequence.

Where a run stands in its data is one integer, the number of the next sample: PackedSequences keeps no state, so a
resumed run, another batch size and every data-parallel rank read the same sequences.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from elastic_core import config
from elastic_core.data.packing import PackedDocuments, Windows, schedule
from elastic_core.data.token_files import Manifest, Split
from elastic_core.errors import UserError

IGNORED_LABEL = -100  # torch's cross_entropy leaves these positions out


class TokenData:
    """A data directory, memory-mapped; every file is checked against the manifest on opening.

    Raises ValueError where the directory is no data directory, or a file is missing, cut short or of another size.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        path = self.directory / "manifest.json"
        if not path.is_file():
            raise UserError(f"{self.directory}: not a data directory (no manifest.json); make one with prepare_data")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not readable as JSON ({error}); run prepare_data again") from None
        self.manifest = config.load(Manifest, values, str(path))
        self._arrays = {
            (name, split): self._open(entry)
            for name, source in self.manifest.sources.items()
            for split, entry in source.splits.items()
        }

    def tokens(self, source: str, split: str) -> np.ndarray:
        """All tokens of one split, (num_tokens,), uint16 or uint32, memory-mapped."""
        return self._arrays[self._key(source, split)][0]

    def offsets(self, source: str, split: str) -> np.ndarray:
        """Document starts, and the end of the last, (num_documents + 1,), int64, memory-mapped."""
        return self._arrays[self._key(source, split)][1]

    def bytes_per_token(self, source: str, split: str) -> float:
        """Bytes of UTF-8 text per token: a loss in nats per token, over ln 2 and this, is in bits per byte."""
        self._key(source, split)
        entry = self.manifest.sources[source].splits[split]
        return entry.num_bytes / entry.num_tokens

    def _key(self, source: str, split: str) -> tuple[str, str]:
        if (source, split) not in self._arrays:
            allowed = ", ".join(f"{name}/{part}" for name, part in self._arrays)
            raise UserError(f"no data {source}/{split} in {self.directory}; there are {allowed}")
        return source, split

    def _open(self, entry: Split) -> tuple[np.ndarray, np.ndarray]:
        tokens = self._map(entry.tokens, entry.num_tokens, self.manifest.dtype)
        offsets = self._map(entry.offsets, entry.num_documents + 1, np.dtype(np.int64))
        if offsets[0] != 0 or offsets[-1] != entry.num_tokens:
            raise UserError(f"{self.directory / entry.offsets}: does not belong to {entry.tokens}; prepare again")
        return tokens, offsets

    def _map(self, name: str, size: int, dtype: np.dtype) -> np.ndarray:
        path = self.directory / name
        try:
            array = np.load(path, mmap_mode="r")
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{path}: missing, cut short or not an array ({error}); run prepare_data again") from None
        if array.shape != (size,) or array.dtype != dtype:
            found = f"{array.dtype} {array.shape}"
            raise UserError(f"{path}: holds {found}, the manifest says {dtype} ({size},); run prepare_data again")
        return array


class PackedSequences:
    """A stateless, endless map from sample numbers 0, 1, 2, ... to training sequences.

    `mixture` gives each source's share, relative to the sum. After any number of samples each source's count is less
    than one off its share (so less than two in any window of samples). Within a source every sequence comes once per
    epoch, in an order drawn from (seed, source, epoch). Running text is cut into windows that overlap by one token, so
    that every token is predicted once; whole documents are packed into rows, and those longer than a row are left out.

    Raises ValueError for an unknown source, shares that are negative or all zero, and a source of which nothing fills
    (running text) or fits (whole documents) one sequence.
    """

    def __init__(self, data: TokenData, mixture: Mapping[str, float], sequence_length: int, seed: int):
        shares = _normalise(mixture, data)
        if sequence_length < 1:
            raise UserError(f"sequence_length: got {sequence_length}; allowed: 1 or more")
        self.sequence_length = sequence_length
        self.sources = tuple(shares)
        self._seed = seed
        self._eos = data.manifest.eos_token_id
        self._rows = [_rows(data, name, "train", sequence_length) for name in self.sources]
        self._schedule = schedule(list(shares.values()))
        self._counts = np.bincount(self._schedule, minlength=len(self.sources))
        hits = self._schedule[:, None] == np.arange(len(self.sources))
        self._earlier = (np.cumsum(hits, axis=0) - hits)[np.arange(len(hits)), self._schedule]
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def num_sequences(self, source: str) -> int:
        """Sequences in one epoch of `source`."""
        return len(self._rows[self.sources.index(source)])

    def source_indices(self, first: int, count: int) -> np.ndarray:
        """Which entry of `sources` each of the samples comes from, (count,)."""
        return self._schedule[np.arange(first, first + count) % len(self._schedule)]

    def batch(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples `first` to `first + count - 1`.

        Returns the input ids (count, L) and the labels (count, L), both int64: a label is the next token, and
        IGNORED_LABEL where a row is padded.
        """
        samples = np.arange(first, first + count)
        sources = self.source_indices(first, count)
        turns = samples // len(self._schedule) * self._counts[sources]
        turns += self._earlier[samples % len(self._schedule)]
        picks = [(self._rows[s], self._shuffled(int(s), int(turn))) for s, turn in zip(sources, turns, strict=True)]
        return _read(picks, self.sequence_length, self._eos)

    def _shuffled(self, source: int, turn: int) -> int:
        epoch, position = divmod(turn, len(self._rows[source]))
        if self._orders.get(source, (None,))[0] != epoch:  # a cache, not state: recomputing gives the same
            name = int.from_bytes(hashlib.sha256(self.sources[source].encode()).digest()[:8], "big")
            order = np.random.default_rng([self._seed, name, epoch]).permutation(len(self._rows[source]))
            self._orders[source] = epoch, order
        return int(self._orders[source][1][position])


def held_out_batches(
    data: TokenData, source: str, sequence_length: int, batch_size: int, max_tokens: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The held-out sequences of one source in order: input ids and labels, each (up to batch_size, L), int64.

    Every token but the very first is predicted once; the last window is padded. Stops at the first batch that reaches
    `max_tokens` positions (null: reads everything).
    """
    rows = _rows(data, source, "held_out", sequence_length, keep_tail=True)
    num_rows = len(rows) if max_tokens is None else min(len(rows), max(1, -(-max_tokens // sequence_length)))
    for first in range(0, num_rows, batch_size):
        picks = [(rows, row) for row in range(first, min(first + batch_size, num_rows))]
        yield _read(picks, sequence_length, data.manifest.eos_token_id)


def vocabulary_sha256(tokenizer) -> str:
    """Fingerprint of a transformers tokenizer's vocabulary: the sha256 of its tokens and their ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def check_tokenizer(data: TokenData, tokenizer, vocab_size: int | None = None, owner: str = "the model") -> None:
    """Raise ValueError unless `tokenizer` is the one that wrote `data`, and a model's `vocab_size` has room for it.

    `tokenizer` is a tokenizer or the directory of one (a parent's, a teacher's), or None to check the size alone.
    A model's vocabulary may be larger than its tokenizer's: it is often padded. `owner` names the model in the error.
    """
    manifest = data.manifest
    advice = f"prepare the data with {owner}'s tokenizer, or take another model"
    if vocab_size is not None and vocab_size < manifest.vocab_size:
        raise UserError(
            f"{data.directory} holds token ids up to {manifest.vocab_size - 1}, but {owner} has a vocabulary of "
            f"{vocab_size}; {advice}"
        )
    if isinstance(tokenizer, (str, Path)):
        from transformers import AutoTokenizer  # slow to import, and needed here only

        owner, tokenizer = f"{owner} ({tokenizer})", AutoTokenizer.from_pretrained(tokenizer)
    if tokenizer is not None and vocabulary_sha256(tokenizer) != manifest.tokenizer_sha256:
        raise UserError(
            f"{data.directory} was tokenised with another vocabulary ({manifest.vocab_size} tokens, sha256 "
            f"{manifest.tokenizer_sha256[:12]}) than that of {owner} ({len(tokenizer)} tokens, "
            f"{vocabulary_sha256(tokenizer)[:12]}); {advice}"
        )


def _normalise(mixture: Mapping[str, float], data: TokenData) -> dict[str, float]:
    allowed = ", ".join(data.manifest.sources)
    for name, share in mixture.items():
        if name not in data.manifest.sources:
            raise UserError(f"mixture: unknown source {name!r}; {data.directory} has {allowed}")
        if not 0 <= share < float("inf"):
            raise UserError(f"mixture.{name}: got {share}; allowed: 0 or more")
    if not any(mixture.values()):
        raise UserError(f"mixture: got {dict(mixture)}; at least one source ({allowed}) needs a positive share")
    return {name: share for name, share in mixture.items() if share}


def _rows(
    data: TokenData, source: str, split: str, sequence_length: int, keep_tail: bool = False
) -> Windows | PackedDocuments:
    """One split as rows of `sequence_length` + 1 tokens: inputs and labels overlap in all but one."""
    tokens, manifest = data.tokens(source, split), data.manifest
    where = f"{data.directory}, {source}/{split}"
    if not manifest.sources[source].whole_documents:
        rows = Windows(tokens, sequence_length + 1, keep_tail)
        if len(rows) == 0:
            raise UserError(
                f"{where}: {len(tokens)} tokens do not fill one sequence of sequence_length {sequence_length} "
                f"(which needs {sequence_length + 1}); shorten it or give the source more text"
            )
        return rows
    # A document is read after its bos at evaluation, so a row must start with one too.
    lead = manifest.eos_token_id if manifest.bos_token_id == manifest.eos_token_id else None
    rows = PackedDocuments(tokens, data.offsets(source, split), sequence_length + 1, lead)
    if len(rows) == 0:
        raise UserError(
            f"{where}: no document fits sequence_length {sequence_length}, the shortest has {rows.shortest} tokens; "
            "lengthen the sequences or make shorter documents"
        )
    return rows


def _read(
    picks: list[tuple[Windows | PackedDocuments, int]], sequence_length: int, eos: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = np.full((len(picks), sequence_length + 1), eos, dtype=np.int64)  # (B, L + 1)
    sizes = np.array([source.read(row, out) for (source, row), out in zip(picks, rows, strict=True)])
    labels = rows[:, 1:].copy()
    labels[np.arange(1, sequence_length + 1) >= sizes[:, None]] = IGNORED_LABEL
    return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(labels)
