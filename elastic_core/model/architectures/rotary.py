"""Rotary position embeddings (RoPE): their frequencies, and the rotation of queries and keys.

The modeling files of transformers are not imported for it, because that takes a second.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from elastic_core.model.documents import Documents
from elastic_core.model.ops.device_copy import to_device
from elastic_core.model.rope_scaling import ROPE_TYPES


def rope_requirements(config, head_dim: int) -> list[tuple[bool, str]]:
    """Conditions on a configuration with heads of `head_dim` channels, each as (holds, message if it does not hold)."""
    rope, problem = config.rope_parameters, _problem(config, head_dim)
    return [
        (
            rope["rope_type"] in ROPE_TYPES,
            f"rope_type={rope['rope_type']!r}; allowed: {', '.join(map(repr, ROPE_TYPES))}",
        ),
        (
            rope.get("partial_rotary_factor") in (None, 1),
            f"partial_rotary_factor={rope.get('partial_rotary_factor')}; allowed: 1, whole heads",
        ),
        (problem is None, f"rope_parameters={rope}: {problem}"),
    ]


def _problem(config, head_dim: int) -> str | None:
    """Why there are no rotary frequencies for these values, or None. transformers checks only some of them."""
    if head_dim % 2 or head_dim < 2:
        return f"heads of {head_dim} channels; allowed: even numbers, because channels are rotated in pairs"
    try:
        frequencies, scale = rotary_frequencies(config, head_dim)
    except (TypeError, ValueError, KeyError, ArithmeticError, RuntimeError) as error:
        return f"transformers computes no frequencies with them ({type(error).__name__}: {error})"
    is_finite = bool(frequencies.isfinite().all()) and math.isfinite(scale)
    return None if is_finite else "the frequencies are not finite; allowed: numbers above 0"


def rotary_frequencies(config, head_dim: int) -> tuple[Tensor, float]:
    """The frequencies (head_dim / 2,) and the factor of cosines and sines, as in transformers."""
    rope = config.rope_parameters
    with torch.device("cpu"):  # models are built on the meta device, but these frequencies need values
        if rope["rope_type"] in ROPE_INIT_FUNCTIONS:
            return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
        # transformers has this formula only in modeling files.
        return 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim)), 1.0


class Rotary:
    """Cosines and sines of the rotary position embedding, computed as in transformers."""

    def __init__(self, config, head_dim: int):
        frequencies, self.scale = rotary_frequencies(config, head_dim)
        self._frequencies = {frequencies.device: frequencies}

    def __call__(self, like: Tensor, documents: Documents | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions, with the type and device of `like` (B, L, ...).

        (L, head_dim) for positions 0 to L - 1; with documents, (B, L, head_dim), from 0 in each document.
        """
        if like.device not in self._frequencies:
            self._frequencies[like.device] = to_device(next(iter(self._frequencies.values())), like.device)
        length = like.shape[1] if documents is None else documents.row_length
        positions = torch.arange(length, device=like.device, dtype=torch.float32)
        angles = positions[:, None] * self._frequencies[like.device]  # (L, head_dim / 2)
        angles = torch.cat([angles, angles], dim=-1)
        tables = (angles.cos() * self.scale).to(like.dtype), (angles.sin() * self.scale).to(like.dtype)
        return tables if documents is None else tuple(table[documents.positions] for table in tables)


def rotate(tensors: Iterable[Tensor], cosines: Tensor, sines: Tensor) -> list[Tensor]:
    """Rotate the channels of heads, (B, L, heads, head_dim) each: channel i together with i + head_dim / 2.

    cosines and sines: (L, head_dim) or (B, L, head_dim).
    """
    cosines, sines = cosines.unsqueeze(-2), sines.unsqueeze(-2)  # (..., L, 1, head_dim)
    return [heads * cosines + _quarter_turn(heads) * sines for heads in tensors]


def _quarter_turn(heads: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
