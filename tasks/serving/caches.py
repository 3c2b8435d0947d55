"""The states of several texts as rows of one cache, so that the model reads the next token of all in one call.

In a cache with several rows, shorter texts begin with padding, which an attention mask hides. States of Mamba layers
need none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache


def join(caches: list[Cache]) -> Cache:
    """One cache with the rows of all. It shares no memory with them, so that a call of the model leaves them alone."""

    def padded(keys: list[Tensor]) -> Tensor:  # each (B, heads, L, channels)
        longest = max(one.shape[2] for one in keys)
        return torch.cat([F.pad(one, (0, 0, longest - one.shape[2], 0)) for one in keys])

    return _rebuilt(caches, padded, torch.cat)


def select(cache: Cache, rows: list[int], length: int) -> Cache:
    """A cache with the given rows, of which the longest has read `length` tokens. It shares no memory with `cache`."""

    def chosen(states: list[Tensor]) -> Tensor:
        return states[0][rows]

    def without_padding(keys: list[Tensor]) -> Tensor:
        return chosen(keys)[:, :, keys[0].shape[2] - length :].contiguous()

    return _rebuilt([cache], without_padding, chosen)


def shorten(cache: Cache, length: int) -> Cache:
    """A copy of a cache with one row, after its first `length` tokens only. Not for caches with recurrent states."""
    assert not has_recurrent_states(cache)
    return _rebuilt([cache], lambda keys: keys[0][:, :, :length].contiguous(), None)


def has_recurrent_states(cache: Cache) -> bool:
    """Whether a layer has a state that can only be read on from its end, as Mamba layers have."""
    return any(hasattr(layer, "recurrent_states") for layer in cache.layers)


def has_attention(cache: Cache) -> bool:
    return any(getattr(layer, "keys", None) is not None for layer in cache.layers)


def num_bytes(cache: Cache) -> int:
    """The bytes of all states."""
    tensors = []
    for layer in cache.layers:
        tensors += [getattr(layer, name, None) for name in ("keys", "values")]
        for name in ("conv_states", "recurrent_states"):
            tensors += getattr(layer, name, {}).values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _rebuilt(
    caches: list[Cache],
    of_keys: Callable[[list[Tensor]], Tensor],
    of_states: Callable[[list[Tensor]], Tensor] | None,
) -> Cache:
    """A new cache of the same kind. `of_keys` makes keys and values, `of_states` the states of Mamba layers."""
    result = copy.copy(caches[0])
    result.layers = []
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        layer = copy.copy(layers[0])
        if getattr(layer, "keys", None) is not None:
            layer.keys, layer.values = of_keys([one.keys for one in layers]), of_keys([one.values for one in layers])
        for name in ("conv_states", "recurrent_states"):
            if hasattr(layer, name):
                states = {i: [getattr(one, name)[i] for one in layers] for i in getattr(layer, name)}
                setattr(layer, name, {i: None if s[0] is None else of_states(s) for i, s in states.items()})
        result.layers.append(layer)
    return result
