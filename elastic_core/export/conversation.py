"""A text that several budgets of a NestedModel read and continue in turn, each with a cache of its own."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from elastic_core.errors import UserError
from elastic_core.export.elastic_checkpoint import BudgetLike
from elastic_core.export.generation_options import ONE_TENSOR, check_options, value_of
from elastic_core.export.view_model import submodel_config
from elastic_core.model import architectures
from elastic_core.model.dims import kept_rows
from elastic_core.model.submodel import Submodel

# A cache has one row for each row of the text. Cache and mask are the conversation's.
ALLOWED = ONE_TENSOR | {"num_beams": 1, "past_key_values": None, "attention_mask": None}


class Conversation:
    """A text that several budgets read and continue in turn. `.input_ids` (B, L) int64 is the text so far, or None.

    All rows are read without padding. So no row may end before the others, unless the conversation ends there.

    Every budget has a cache of its own, because the states of Mamba and attention layers depend on the budget. When it
    is a budget's turn, it first reads what others have added. So it generates the same tokens as the extracted model
    would for the same text.

    With ``hand_over``, a budget starts from the cache of a larger budget: it takes the states of its own layers, heads
    and channels, and reads only the rest of the text. This is faster, but the states are not those that the smaller
    budget would have computed, so the tokens can differ. The reverse is not possible: the cache of a smaller budget has
    no states for the layers, heads and channels that only the larger budget has.
    """

    def __init__(self, model):  # a NestedModel
        self.model, self.input_ids = model, None
        self.caches: dict[Submodel, Cache] = {}  # the states of each budget after the text that it has read
        self._ended: list[int] = []  # rows that end with padding

    def say(self, input_ids: Tensor) -> None:
        """Append tokens to the text: (B, L) int64. Raises UserError if a row has ended before the others."""
        self._check_rows()
        self.input_ids = input_ids if self.input_ids is None else torch.cat([self.input_ids, input_ids], dim=1)

    def generate(self, budget: BudgetLike, hand_over: bool = False, **options) -> Tensor:
        """Continue the text with the model of a budget. Returns the new tokens (B, N), which are appended to the text.

        `options` are those of transformers' `generate`. If it fails or is stopped, the text stays as it was.

        A row that ends before the others is filled with pad tokens. The next turn would read these as text, so it
        raises UserError. Raises UserError also for an option that `ALLOWED` refuses, and if there is no text yet.
        """
        if self.input_ids is None:
            raise UserError("conversation: there is no text yet; start with say(input_ids)")
        self._check_rows()
        submodel, length = self.model.submodel(budget), self.input_ids.shape[1]
        model = self.model.at(submodel)
        where = "in a conversation; allowed: num_beams=1, num_return_sequences=1, and a tensor as the result"
        check_options(ALLOWED, options, model.generation_config, where)
        no_padding = torch.ones_like(self.input_ids)  # Without a mask, transformers would guess padding from token ids.
        caching = architectures.cache_values(self.model.config, submodel.kept_layers)
        if not caching:
            if hand_over:
                self._take_over(submodel)
            cache = self.caches.setdefault(submodel, DynamicCache(config=model.config))
            caching = {"use_cache": True, "past_key_values": cache}
        try:
            output = model.generate(self.input_ids, attention_mask=no_padding, **caching, **options)
            ended = ended_early(output[:, length:], options, model.generation_config)
        except BaseException:  # the cache may have read new tokens, which are not in the text
            self.caches.pop(submodel, None)
            raise
        self.input_ids, self._ended = output, ended
        return output[:, length:]

    def _check_rows(self) -> None:
        """Raise UserError if a row ends with padding."""
        if self._ended:
            raise UserError(
                f"conversation: rows {self._ended[:5]} ended before the others and were filled with pad tokens, which "
                "the next turn would read as text; allowed: one conversation per row, or rows that end together"
            )

    def _take_over(self, submodel: Submodel) -> None:
        """Take the submodel's states from the cache of the larger budget that has read the most text.

        Nothing happens unless that one has read more than the submodel itself.
        """
        own = self.caches.get(submodel)
        best, num_read = None, 0 if own is None else own.get_seq_length()
        for other, cache in self.caches.items():
            if other != submodel and submodel.is_within(other, self.model.config) and cache.get_seq_length() > num_read:
                best, num_read = other, cache.get_seq_length()
        if best is not None:
            self.caches[submodel] = part_of_cache(self.model.config, self.caches[best], best, submodel)


def ended_early(new: Tensor, options: dict, generation: GenerationConfig) -> list[int]:
    """The rows of the new tokens (B, N) that `generate` has filled with pad tokens, because other rows went on.

    generation: the model's. options: those of the call. A pad token at the end of a row counts as padding if the row
    may have been ended by `stop_strings` or `stopping_criteria`.
    """
    end, pad = (value_of(name, options, generation) for name in ("eos_token_id", "pad_token_id"))
    if end is None or len(new) == 1:  # then `generate` fills no rows
        return []
    end = torch.as_tensor(end, device=new.device).flatten()
    ended = torch.isin(new[:, :-1], end).any(1)
    if any(value_of(name, options, generation) for name in ("stop_strings", "stopping_criteria")):
        ended |= (new[:, -1:] == (end[0] if pad is None else pad)).any(1)
    return ended.nonzero()[:, 0].tolist()


def new_cache(config) -> DynamicCache:
    """An empty cache. Without attention layers it gets an unused one, which transformers asks for the text's length."""
    cache = DynamicCache(config=config)
    if not any(isinstance(layer, DynamicLayer) for layer in cache.layers):
        cache.layers.append(DynamicLayer())
    return cache


def part_of_cache(config, cache: Cache, larger: Submodel, smaller: Submodel) -> Cache:
    """A cache for `smaller` with its part of the states in the cache of `larger`. `smaller` is nested in `larger`."""
    layout, part = architectures.parameter_layout(config), new_cache(submodel_config(config, smaller))
    sizes, larger_sizes = smaller.sizes(config), larger.sizes(config)

    def within(layer: int, name: str) -> Tensor:
        """For each row of a layer's parameter in the smaller submodel, its position among the rows of the larger."""
        dim = layout[f"model.layers.{layer}.{name}"][0]
        rows, larger_rows = kept_rows(dim, sizes), kept_rows(dim, larger_sizes)
        rows, larger_rows = (torch.arange(r) if isinstance(r, int) else r for r in (rows, larger_rows))
        return torch.searchsorted(larger_rows.contiguous(), rows.contiguous())

    for number, layer in enumerate(smaller.kept_layers):
        state = cache.layers[larger.kept_layers.index(layer)]
        architectures.of(config).copy_state(config, layer, state, functools.partial(within, layer), part, number)
    return part
