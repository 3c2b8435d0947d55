"""The states after texts that were read before, so that the next turn of a conversation reads only what is new.

The rules are those of `Conversation` (elastic_core/export/conversation.py): every budget goes on from its own states
only, and so gives what it would give for the whole text. With `hand_over`, a smaller budget may also go on from its
part of a larger one's states.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from transformers import Cache

from elastic_core.export.conversation import part_of_cache
from elastic_core.model.submodel import Submodel
from tasks.serving import caches

Key = tuple[Submodel, tuple[int, ...]]


class Prefixes:
    """Caches by budget and tokens. Those that were used last are kept, up to `max_bytes` in all."""

    def __init__(self, config, max_bytes: int):
        """`config`: of the parent."""
        self._config, self.max_bytes, self.num_bytes = config, max_bytes, 0
        self._entries: OrderedDict[Key, Cache] = OrderedDict()

    def put(self, submodel: Submodel, tokens: list[int], cache: Cache) -> None:
        """Keep the states of `submodel` after `tokens`. Nothing may change `cache` later."""
        size, key = caches.num_bytes(cache), (submodel, tuple(tokens))
        if size > self.max_bytes:
            return
        self._drop(key)
        if not caches.has_recurrent_states(cache):  # the new states stand for those after fewer of the tokens too
            for old in [old for old in self._entries if old[0] == submodel and key[1][: len(old[1])] == old[1]]:
                self._drop(old)
        self._entries[key] = cache
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            self._drop(next(iter(self._entries)))

    def find(self, submodel: Submodel, tokens: list[int], hand_over: bool) -> tuple[Cache | None, int]:
        """A copy of the states after as many of the first `tokens` as possible, and how many these are.

        At least one token is left to be read, because its logits are needed. (None, 0) if there are no states.
        """
        best, length = None, 0
        for key in self._entries:
            if key[0] != submodel and not (hand_over and submodel.is_within(key[0], self._config)):
                continue
            if (usable := self._usable(key, tokens)) > length:
                best, length = key, usable
        if best is None:
            return None, 0
        self._entries.move_to_end(best)
        cache = self._entries[best]
        cache = caches.join([cache]) if length == len(best[1]) else caches.shorten(cache, length)
        return (cache if best[0] == submodel else part_of_cache(self._config, cache, best[0], submodel)), length

    def _usable(self, key: Key, tokens: list[int]) -> int:
        """How many of the first `tokens` the states of an entry can stand for."""
        read, most = key[1], len(tokens) - 1
        if caches.has_recurrent_states(self._entries[key]):
            return len(read) if len(read) <= most and tuple(tokens[: len(read)]) == read else 0
        most = min(most, len(read))
        same = torch.tensor(read[:most]) == torch.tensor(tokens[:most])
        return most if bool(same.all()) else int(same.int().argmin())

    def _drop(self, key: Key) -> None:
        cache = self._entries.pop(key, None)
        self.num_bytes -= 0 if cache is None else caches.num_bytes(cache)
