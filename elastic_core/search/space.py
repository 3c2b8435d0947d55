"""The elastic space: which sizes each axis may take, and what every combination of them costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_core.config import ConfigError, require
from elastic_core.cost.metrics import PARAMETERS, Metric, expected_cost
from elastic_core.errors import UserError
from elastic_core.model import architectures
from elastic_core.model.axes import AXES, EXPERTS, FIELDS, PER_LAYER, WIDTHS
from elastic_core.model.submodel import Submodel, keys_of
from elastic_core.search.choices import Choices

EXPERT_ROW = 8  # numbers in bfloat16, 16 bytes, of which a row of an expert's matrices has to be a multiple


@dataclass(frozen=True)
class Slot:
    """One decision: an axis, the unit keys it sets, and the sizes to choose from, largest first."""

    axis: str
    keys: tuple[str, ...]
    sizes: tuple[int, ...]


class ElasticSpace:
    """All decisions of a parent's family, and their translation to sizes, masks, costs and submodels.

    A combination is a list of choice indices, one per slot; a distribution is a list of probability vectors, one per
    slot, each (number of choices,). `depth_ranking` lists layers from the most to the least important; costs are in
    the unit of `metric`.
    """

    def __init__(
        self,
        config,
        choices: Choices,
        depth_ranking: tuple[int, ...],
        where: str = "choices",
        metric: Metric = PARAMETERS,
    ):
        self.config, self.depth_ranking, self.metric = config, tuple(depth_ranking), metric
        num_layers = architectures.num_layers(config)
        if sorted(self.depth_ranking) != list(range(num_layers)):
            raise UserError(f"depth_ranking: got {self.depth_ranking}; expected every layer 0..{num_layers - 1} once")
        self.units = architectures.units(config)
        _check_expressible(config, choices, where)
        self.slots = [slot for axis in AXES for slot in self._slots(axis, choices, where)]
        self.keep = torch.zeros(len(self.slots[-1].sizes), num_layers)  # (depth choices, layers)
        for row, depth in zip(self.keep, self.slots[-1].sizes, strict=True):
            row[list(self.depth_ranking[:depth])] = 1
        self.ends = [len(slot.sizes) for slot in self.slots]  # a submodel takes choices before these
        self.ends[-1] = self._num_servable_depths()
        self.slot_masks = [self.keep if slot.axis == "depth" else self.masks(slot) for slot in self.slots]

    def _slots(self, axis: str, choices: Choices, where: str) -> list[Slot]:
        field = FIELDS.get(axis, axis)  # depth is called so in both
        if axis == "depth":
            full, keys, groups, least = architectures.num_layers(self.config), ("depth",), 1, 1
        else:
            keys = tuple(keys_of(self.units, axis))
            if not keys:  # the parent has no such layers
                known = field not in EXPERTS or getattr(choices, field) is None
                require(known, f"{where}.{field}", getattr(choices, field), "null, for the parent has no experts")
                return []
            units = self.units[keys[0]]
            full, groups, least = units.size, units.groups, units.least
        sizes = getattr(choices, field) or (full,)
        multiples = f", in multiples of {groups}" if groups > 1 else ""
        multiples += f", {least} or more" if least > 1 else ""
        valid = all(least <= size <= full and size % groups == 0 for size in sizes)
        if sizes[0] != full or list(sizes) != sorted(set(sizes), reverse=True) or not valid:
            raise ConfigError(
                f"{where}.{field}: got {list(sizes)}; allowed: different sizes, largest first, "
                f"starting with the parent's own {full}{multiples}"
            )
        per_layer = field in choices.heterogeneous
        return [Slot(axis, (key,), sizes) for key in keys] if per_layer else [Slot(axis, keys, sizes)]

    def _num_servable_depths(self) -> int:
        """How many depths, from the full one on, keep a layer that a cache needs; all where the parent has none."""
        family, layers = architectures.of(self.config), self.depth_ranking
        depths = self.slots[-1].sizes
        if not family.can_cache(self.config, layers):
            return len(depths)
        return sum(family.can_cache(self.config, layers[:depth]) for depth in depths)

    def cost(self, probs: list[Tensor]) -> Tensor:
        """Expected cost under independent distributions, differentiable (eq. 12)."""
        sizes = {}
        for slot, prob in zip(self.slots, probs, strict=True):
            expected = prob @ torch.tensor(slot.sizes, dtype=prob.dtype)
            sizes.update(dict.fromkeys(slot.keys, expected))
        return expected_cost(self.metric, self.config, sizes, probs[-1] @ self.keep.to(probs[-1].dtype))

    def exact_cost(self, indices: list[int]) -> float:
        """Cost of one combination."""
        return self.costs(torch.tensor([indices])).item()

    def costs(self, indices: Tensor) -> Tensor:
        """Costs (float64) of many combinations at once: (N, slots) int64 → (N,)."""
        sizes = {}
        for slot, column in zip(self.slots, indices.T, strict=True):
            sizes.update(dict.fromkeys(slot.keys, torch.tensor(slot.sizes, dtype=torch.float64)[column]))
        return expected_cost(self.metric, self.config, sizes, self.keep.double()[indices[:, -1]].T)

    def grid_costs(self, slots: list[Slot] | None = None) -> Tensor:
        """Cost of every combination (float64), one dimension per slot (per-layer choices: per axis)."""
        slots = slots or self.axis_slots()
        sizes = {}
        for dim, slot in enumerate(slots):
            shape = [1] * len(slots)
            shape[dim] = len(slot.sizes)
            sizes.update(dict.fromkeys(slot.keys, torch.tensor(slot.sizes, dtype=torch.float64).view(shape)))
        keep = self.keep.double().T.reshape(self.keep.shape[1], *[1] * (len(slots) - 1), -1)
        costs = expected_cost(self.metric, self.config, sizes, keep)
        return costs.expand([len(slot.sizes) for slot in slots])

    def axis_slots(self) -> list[Slot]:
        """One slot per axis, as if every axis chose once for the whole model."""
        merged: dict[str, Slot] = {}
        for slot in self.slots:
            keys = merged[slot.axis].keys if slot.axis in merged else ()
            merged[slot.axis] = Slot(slot.axis, keys + slot.keys, slot.sizes)
        return list(merged.values())

    def masks(self, slot: Slot) -> Tensor:
        """Prefix masks of a slot's choices (choices, full size): row i keeps the first sizes[i] (in every group)."""
        units = self.units[slot.keys[0]]
        masks = torch.zeros(len(slot.sizes), units.size)
        for row, size in zip(masks, slot.sizes, strict=True):
            row[units.prefix(size)] = 1
        return masks

    def soft_gates(self, probs: list[Tensor]) -> dict[str, Tensor]:
        """Gates of the soft mode: Σ_i π_i·I_i per unit key, and the probability to be kept per layer (``depth``)."""
        gates = {}
        for slot, prob, masks in zip(self.slots, probs, self.slot_masks, strict=True):
            gates.update(dict.fromkeys(slot.keys, prob @ masks))
        return gates

    def hard_gates(self, probs: list[Tensor], indices: list[int]) -> dict[str, Tensor]:
        """Straight-through gates of the hard mode: π_i / stop_gradient(π_i), of value one."""
        gates = {}
        for slot, prob, index in zip(self.slots, probs, indices, strict=True):
            gate = prob[index] / prob[index].detach()
            if slot.axis == "depth":
                gate = gate.expand(self.keep.shape[1])
            gates.update(dict.fromkeys(slot.keys, gate))
        return gates

    def submodel(self, indices: list[int]) -> Submodel:
        """The submodel of one combination."""
        sizes = {key: slot.sizes[index] for slot, index in zip(self.slots, indices, strict=True) for key in slot.keys}
        fields = {"kept_layers": self.depth_ranking[: sizes["depth"]]}
        for name, axis in WIDTHS.items():
            if keys := keys_of(self.units, axis):
                values = tuple(sizes[key] for key in keys)
                fields[name] = values if name in PER_LAYER else values[0]
        return Submodel(**fields).resolve(self.config)


def _check_rows_of_experts(config, choices: Choices, where: str) -> None:
    """Raise ConfigError where transformers' grouped products take the parent's experts, but not a member's."""
    of_experts = {"moe_intermediate_size": config.moe_intermediate_size}
    if getattr(config, "moe_latent_size", None) is None:
        of_experts["hidden_size"] = config.hidden_size
    for name, full in of_experts.items():
        for size in getattr(choices, name) or ():
            allowed = f"multiples of {EXPERT_ROW}, or transformers' grouped products over experts refuse the model"
            require(full % EXPERT_ROW != 0 or size % EXPERT_ROW == 0, f"{where}.{name}", size, allowed)


def _check_expressible(config, choices: Choices, where: str) -> None:
    """Raise ConfigError where the router could choose what no directory of the parent's family can say."""
    family = architectures.of(config)
    if architectures.has_experts(config):
        _check_rows_of_experts(config, choices, where)
    if family.MODELING_FILE is None:
        for name in choices.heterogeneous:
            require(
                name == "intermediate_size", f"{where}.heterogeneous", name, f"intermediate_size ({config.model_type})"
            )
    for hidden_size in choices.hidden_size or (config.hidden_size,):
        for num_heads in choices.num_attention_heads or (config.num_attention_heads,):
            problem = family.size_problem(config, hidden_size, num_heads)
            if problem is not None:
                raise ConfigError(f"{where}.{problem}")
