"""The texts that one budget continues at the same time: a forward call gives the next token of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from tasks.serving import caches


def read(model: PreTrainedModel, cache: Cache, tokens: list[int], start: int) -> Tensor:
    """Read the tokens of one text on from its first `start` tokens, which are in `cache`: → logits (V,) after them."""
    device = model.device
    positions = torch.arange(start, start + len(tokens), device=device)[None]
    ids = torch.tensor([tokens], device=device)
    output = model(ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[0, -1]


@dataclass(eq=False)
class Row:
    """A text in a batch. `owner`: whom it belongs to. `length`: tokens in the cache. `token`: the next one to read."""

    owner: object
    length: int
    token: int


class Batch:
    """Texts of one budget. `rows` are in the order of the cache's rows."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.rows, self._cache = model, [], None

    def add(self, row: Row, cache: Cache) -> None:
        """Add a text. `cache` holds its first `row.length` tokens, and is copied."""
        self._cache = caches.join([cache] if self._cache is None else [self._cache, cache])
        self.rows.append(row)

    def step(self) -> Tensor:
        """Read the next token of every text: → logits (B, V). The rows' `token` is then to be set anew."""
        lengths, device = torch.tensor([row.length for row in self.rows]), self.model.device
        ids = torch.tensor([[row.token] for row in self.rows], device=device)
        mask = None  # (B, longest + 1), true where a text is
        if caches.has_attention(self._cache) and lengths.min() < lengths.max():
            mask = torch.arange(lengths.max() + 1) >= (lengths.max() - lengths)[:, None]
            mask = mask.to(device=device, dtype=torch.int64)
        positions = lengths[:, None].to(device)
        output = self.model(
            ids, position_ids=positions, attention_mask=mask, past_key_values=self._cache, use_cache=True
        )
        for row in self.rows:
            row.length += 1
        return output.logits[:, -1]

    def cache_of(self, row: Row) -> Cache:
        """A copy of the states of one text."""
        return caches.select(self._cache, [self.rows.index(row)], row.length)

    def remove(self, gone: list[Row]) -> None:
        """Remove texts, or none if there is no memory for the others without them (torch.OutOfMemoryError)."""
        kept = [i for i, row in enumerate(self.rows) if row not in gone]
        if len(kept) == len(self.rows):
            return
        rows = [self.rows[i] for i in kept]
        longest = max((row.length for row in rows), default=0)
        self._cache = caches.select(self._cache, kept, longest) if kept else None
        self.rows = rows

    def clear(self) -> None:
        """Remove all texts."""
        self.rows, self._cache = [], None
