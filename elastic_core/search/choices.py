"""Section `choices` of params.yaml: the sizes that each axis may take."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_core.config import Require, require
from elastic_core.model.axes import PER_LAYER


@dataclass(frozen=True)
class Choices:
    """The sizes that each axis may keep, largest first. The first size is the parent's own. None keeps that size.

    `depth` lists numbers of layers; the depth ranking decides which layers these are. `num_experts` counts the routed
    experts of a layer, and `moe_intermediate_size` is the width of each of them. An axis named in `heterogeneous`
    (intermediate_size, mamba_num_heads, num_attention_heads) has one choice per layer. Every other axis has one choice
    for the whole model.
    """

    hidden_size: tuple[int, ...] | None = None
    intermediate_size: tuple[int, ...] | None = None
    mamba_num_heads: tuple[int, ...] | None = None
    mamba_head_dim: tuple[int, ...] | None = None
    num_attention_heads: tuple[int, ...] | None = None
    num_experts: tuple[int, ...] | None = None
    moe_intermediate_size: tuple[int, ...] | None = None
    moe_shared_expert_intermediate_size: tuple[int, ...] | None = None
    depth: tuple[int, ...] | None = None
    heterogeneous: tuple[str, ...] = ()

    def check(self, require: Require = require) -> None:
        for name in self.heterogeneous:
            require(name in PER_LAYER, "heterogeneous", name, ", ".join(PER_LAYER))
