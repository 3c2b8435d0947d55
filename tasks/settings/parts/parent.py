"""Section `parent` of params.yaml. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from elastic_core.config import Require, require
from elastic_core.model.rope_scaling import check_rope_scaling
from elastic_core.training.stage import Stage


@dataclass(frozen=True)
class ParentModel:
    """Section `parent.model`: the architecture of a parent that is trained here. Names are transformers'.

    `pattern` has one character per layer: M is Mamba-2, * is attention, - is an MLP.
    """

    pattern: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    n_groups: int
    ssm_state_size: int
    conv_kernel: int = 4
    initializer_range: float = 0.02
    time_step_limit: tuple[float, ...] = (0.0, math.inf)  # the smallest and the largest, see docs/architectures.md

    def check(self, require: Require = require) -> None:
        known = bool(self.pattern) and set(self.pattern) <= set("M*-")
        require(known, "pattern", self.pattern, "characters M, * and -")
        for name, size in vars(self).items():
            require(name in ("pattern", "time_step_limit") or size > 0, name, size, "above 0")
        limit = self.time_step_limit
        is_limit = len(limit) == 2 and 0 <= limit[0] <= limit[1]
        require(is_limit, "time_step_limit", limit, "the smallest and the largest time step, such as [0.0, 0.1]")
        for heads, groups in (("mamba_num_heads", "n_groups"), ("num_attention_heads", "num_key_value_heads")):
            divides = getattr(self, groups) < 1 or getattr(self, heads) % getattr(self, groups) == 0
            require(divides, heads, getattr(self, heads), f"a multiple of {groups} ({getattr(self, groups)})")


@dataclass(frozen=True)
class Parent:
    """Section `parent`: an existing parent, or one that is trained here.

    `path` is a Hugging Face directory, its URL, a name on the hub or a package. With `path` null, `model` is trained.
    `rope_scaling` scales the rotary positions of an existing parent to longer texts, in the form of transformers.
    `untie_head` gives a parent with tied embeddings a head of its own, a copy of the embeddings.
    `clamp_time_step` limits the time step of Mamba layers as transformers does, instead of by `time_step_limit`.
    With a path, `model` and `training` are not used, so they are not read and None.
    """

    path: str | None = None
    model: ParentModel | None = None
    training: Stage | None = None
    rope_scaling: dict[str, Any] | None = None
    untie_head: bool = False
    clamp_time_step: bool = False

    def check(self, require: Require = require) -> None:
        if self.rope_scaling is not None:
            allowed = "null without parent.path: a model that is trained here has no rotary positions"
            require(self.path is not None, "rope_scaling", self.rope_scaling, allowed)
            check_rope_scaling(self.rope_scaling)
        allowed = "false without parent.path: a model that is trained here has a head of its own"
        require(self.path is not None or not self.untie_head, "untie_head", self.untie_head, allowed)
        allowed = (
            "false without parent.path: parent.model.time_step_limit says how a model that is trained here does it"
        )
        require(self.path is not None or not self.clamp_time_step, "clamp_time_step", self.clamp_time_step, allowed)
        if self.path is None:
            for name in ("model", "training"):
                require(getattr(self, name) is not None, name, None, "a section, because parent.path is null")
            for name in ("kl_weight", "state_weight"):
                weight = getattr(self.training.loss, name) if self.training is not None else 0
                require(weight == 0, f"training.loss.{name}", weight, "0: a parent has no teacher")
