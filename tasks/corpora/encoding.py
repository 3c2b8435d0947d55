"""Encodes texts as tokens on all cores.

The order is kept, and only a few batches are in memory at a time, so a corpus may be larger than the memory.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from elastic_core.data.token_files import SPLITS, Manifest
from elastic_core.io.ordered_map import ordered_map

BATCH_CHARACTERS = 1 << 18  # limits memory: the library tokenizers takes about 100 bytes per token of a batch


@dataclass(frozen=True)
class Batch:
    """Encoded documents of one split."""

    split: str
    documents: list[np.ndarray]  # token ids of each document (L,), including eos
    num_bytes: int  # of the texts in UTF-8
    num_characters: int


class Encoder:
    """Encodes documents with a tokenizer. Each document gets bos before it, if the tokenizer has one, and eos after it.

    `threads` is the number of batches encoded at once. The tokenizer releases Python's global lock (GIL), so threads
    are enough to use all cores.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, manifest: Manifest, threads: int):
        # In training text, the spelling of a special token is ordinary text. The copy keeps this option away from the
        # caller's tokenizer.
        self._encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._encoder.encode_special_tokens = True
        self._encoder.no_truncation()
        self._encoder.no_padding()
        eos, bos = manifest.eos_token_id, manifest.bos_token_id
        self._start, self._end = [] if bos is None else [bos], eos
        self._dtype, self._threads = manifest.dtype, threads

    def encoded(self, documents: Iterable[tuple[str, str]]) -> Iterator[Batch]:
        """Encode (split, text) documents in batches. The documents of a split keep their order."""
        return ordered_map(self._encode, _batches(documents), self._threads)

    def _encode(self, batch: tuple[str, list[str]]) -> Batch:
        split, texts = batch
        encodings = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        documents = [np.array([*self._start, *encoding.ids, self._end], self._dtype) for encoding in encodings]
        return Batch(split, documents, sum(len(text.encode()) for text in texts), sum(map(len, texts)))


def num_cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Group texts by split into batches of about BATCH_CHARACTERS, so that one thread has enough work."""
    waiting, sizes = {split: [] for split in SPLITS}, dict.fromkeys(SPLITS, 0)
    for split, text in documents:
        waiting[split].append(text)
        sizes[split] += len(text)
        if sizes[split] >= BATCH_CHARACTERS:
            yield split, waiting[split]
            waiting[split], sizes[split] = [], 0
    yield from ((split, texts) for split, texts in waiting.items() if texts)
