"""The states after texts that were read before, so that the next turn of a conversation reads only what is new.

Every budget goes on from states that it has computed itself, and so gives what it would give for the whole text. With
`hand_over`, a smaller budget may also go on from its part of a larger one's states. What it computes from there is kept
too, but marked as not pure, so that only requests with `hand_over` use it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from transformers import Cache

from elastic_core.export.conversation import part_of_cache
from elastic_core.model.submodel import Submodel
from tasks.serving import caches


class Key(NamedTuple):
    """What the states of an entry are. `pure`: the submodel has computed all of them itself."""

    submodel: Submodel
    tokens: tuple[int, ...]
    pure: bool


class Found(NamedTuple):
    """States to go on from: a copy, of the first `length` tokens of a text. None and 0: there are none."""

    cache: Cache | None = None
    length: int = 0
    pure: bool = True


class Prefixes:
    """Caches by budget, tokens and purity. Those that were used last are kept, up to `max_bytes` in all."""

    def __init__(self, config, max_bytes: int):
        """`config`: of the parent."""
        self._config, self.max_bytes, self.num_bytes = config, max_bytes, 0
        self._entries: OrderedDict[Key, Cache] = OrderedDict()

    def put(self, submodel: Submodel, tokens: list[int], cache: Cache, pure: bool = True) -> None:
        """Keep the states of `submodel` after `tokens`. Nothing may change `cache` later.

        pure: the submodel has computed all states itself; no part is of a larger one.
        """
        size, key = caches.num_bytes(cache), Key(submodel, tuple(tokens), pure)
        if size > self.max_bytes:
            return
        self._drop(key)
        if not caches.has_recurrent_states(cache):  # the new states stand for those after fewer of the tokens too
            for old in [old for old in self._entries if self._replaces(key, old)]:
                self._drop(old)
        self._entries[key] = cache
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            self._drop(next(iter(self._entries)))

    def find(self, submodel: Submodel, tokens: list[int], hand_over: bool) -> Found:
        """A copy of the states after as many of the first `tokens` as possible.

        At least one token is left to be read, because its logits are needed. Of states after equally many tokens, those
        that the submodel has computed itself are taken.
        """
        best, best_rank = None, (0, False, False)
        for key in self._entries:
            own = key.submodel == submodel
            allowed = (own and key.pure) or (hand_over and (own or submodel.is_within(key.submodel, self._config)))
            if allowed and (rank := (self._usable(key, tokens), own and key.pure, own)) > best_rank and rank[0]:
                best, best_rank = key, rank
        if best is None:
            return Found()
        self._entries.move_to_end(best)
        cache, length = self._entries[best], best_rank[0]
        cache = caches.join([cache]) if length == len(best.tokens) else caches.shorten(cache, length)
        if best.submodel != submodel:
            return Found(part_of_cache(self._config, cache, best.submodel, submodel), length, pure=False)
        return Found(cache, length, best.pure)

    def clear(self) -> None:
        """Forget all states, so that their memory is free."""
        self._entries.clear()
        self.num_bytes = 0

    def _replaces(self, new: Key, old: Key) -> bool:
        """Whether the states of `new` can be used wherever those of `old` can."""
        same = old.submodel == new.submodel and new.tokens[: len(old.tokens)] == old.tokens
        return same and (new.pure or not old.pure)

    def _usable(self, key: Key, tokens: list[int]) -> int:
        """How many of the first `tokens` the states of an entry can stand for."""
        read, most = key.tokens, len(tokens) - 1
        if caches.has_recurrent_states(self._entries[key]):
            return len(read) if len(read) <= most and tuple(tokens[: len(read)]) == read else 0
        most = min(most, len(read))
        same = torch.tensor(read[:most]) == torch.tensor(tokens[:most])
        return most if bool(same.all()) else int(same.int().argmin())

    def _drop(self, key: Key) -> None:
        cache = self._entries.pop(key, None)
        self.num_bytes -= 0 if cache is None else caches.num_bytes(cache)
