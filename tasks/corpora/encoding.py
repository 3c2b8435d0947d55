"""Encodes texts as tokens on all cores.

The order is kept, and only a few batches are in memory at a time, so a corpus may be larger than the memory.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from elastic_core.data.token_files import SPLITS, Manifest
from elastic_core.io.ordered_map import ordered_map

BATCH_CHARACTERS = 1 << 18  # limits memory: the library tokenizers takes about 100 bytes per token of a batch
CONTROL_STRINGS = "documents with the spelling of special tokens, which stays text"
Document = TypeVar("Document")  # something with a length, in characters


@dataclass(frozen=True)
class Batch:
    """Encoded documents of one split."""

    split: str
    documents: list[np.ndarray]  # token ids of each document (L,), including eos
    num_bytes: int  # of the texts in UTF-8
    num_characters: int
    trained: list[np.ndarray] | None = None  # whether each token is trained, each (L,) bool; None: all are


class Encoder:
    """Encodes documents with a tokenizer. Each document gets bos before it, if the tokenizer has one, and eos after it.

    `threads` is the number of batches encoded at once. The tokenizer releases Python's global lock (GIL), so threads
    are enough to use all cores. With `parse`, the spelling of a special token in a text becomes its id, and a document
    that has bos and eos already gets no second one. `notes` counts documents with such spellings that stay text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, manifest: Manifest, threads: int, parse: bool = False):
        self._encoder = plain_encoder(tokenizer, special_as_text=not parse)
        eos, bos = manifest.eos_token_id, manifest.bos_token_id
        self._start, self._end, self._parse = [] if bos is None else [bos], eos, parse
        self._dtype, self._threads = manifest.dtype, threads
        self._special = any_of(special_tokens(tokenizer))
        self.skipped, self.notes = Counter(), Counter()

    def encoded(self, documents: Iterable[tuple[str, str]]) -> Iterator[Batch]:
        """Encode (split, text) documents in batches. The documents of a split keep their order."""
        return ordered_map(self._encode, batches(self._counted(documents)), self._threads)

    def _counted(self, documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        for split, text in documents:
            if not self._parse and self._special.search(text):
                self.notes[CONTROL_STRINGS] += 1
            yield split, text

    def _encode(self, batch: tuple[str, list[str]]) -> Batch:
        split, texts = batch
        encodings = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        documents = [np.array(self._complete(encoding.ids), self._dtype) for encoding in encodings]
        return Batch(split, documents, sum(len(text.encode()) for text in texts), sum(map(len, texts)))

    def _complete(self, ids: list[int]) -> list[int]:
        """The ids with bos and eos."""
        start, end = self._start, [self._end]
        if self._parse:
            start = [] if ids[:1] == start else start
            end = [] if ids[-1:] == end else end
        return [*start, *ids, *end]


def plain_encoder(tokenizer: PreTrainedTokenizerFast, special_as_text: bool) -> Tokenizer:
    """A copy of the tokenizer, which adds, truncates and pads nothing.

    `special_as_text`: the spelling of a special token is ordinary text. The copy keeps this option away from the
    caller's tokenizer.
    """
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.encode_special_tokens = special_as_text
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The spellings of the special tokens."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def any_of(tokens: Iterable[str]) -> re.Pattern:
    """A pattern of any of the tokens; the longest wins. Without tokens, it never matches."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def num_cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def batches(documents: Iterable[tuple[str, Document]]) -> Iterator[tuple[str, list[Document]]]:
    """Group documents by split into batches of about BATCH_CHARACTERS, so that one thread has enough work."""
    waiting, sizes = {split: [] for split in SPLITS}, dict.fromkeys(SPLITS, 0)
    for split, text in documents:
        waiting[split].append(text)
        sizes[split] += len(text)
        if sizes[split] >= BATCH_CHARACTERS:
            yield split, waiting[split]
            waiting[split], sizes[split] = [], 0
    yield from ((split, texts) for split, texts in waiting.items() if texts)
