"""The elastic space: all combinations of sizes that a submodel may have, and the cost of each combination."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_core.config import ConfigError, Problems, require
from elastic_core.cost.metrics import PARAMETERS, Metric, expected_cost
from elastic_core.errors import UserError
from elastic_core.model import architectures
from elastic_core.model.axes import AXES, EXPERTS, FIELDS, PER_LAYER, WIDTHS
from elastic_core.model.submodel import Submodel, keys_of
from elastic_core.search.choices import Choices

# transformers multiplies all experts in one grouped product, which needs matrix rows of a multiple of 16 bytes.
EXPERT_ROW_MULTIPLE = 8  # numbers in bfloat16


@dataclass(frozen=True)
class Slot:
    """One decision: one size for one axis, for the whole model or for one layer.

    `keys` are the unit keys that get the chosen size: those of all layers, or that of one layer. `sizes` are the sizes
    to choose from, largest first.
    """

    axis: str
    keys: tuple[str, ...]
    sizes: tuple[int, ...]


class ElasticSpace:
    """All decisions that make a submodel of a parent (`slots`), and their translation to costs, masks and submodels.

    - A combination is a list of choice indices, one per slot. Index 0 is the parent's own size. The last slot is depth.
    - A distribution is a list of probability vectors, one per slot, each (choices,).
    - `depth_ranking` lists all layers from the most to the least important. A depth of d keeps the first d of them.
    - `where` is the name of the section in error messages.
    - Costs are in the unit of `metric`.

    Raises ConfigError for sizes that the parent or its architecture does not allow. Raises UserError if `depth_ranking`
    does not contain every layer once.
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
        self.slots, problems = [], Problems()
        with problems.collecting():
            _check_expressible(config, choices, where)
        for axis in AXES:
            with problems.collecting():
                self.slots += self._slots(axis, choices, where)
        problems.raise_all()
        self.keep = torch.zeros(len(self.slots[-1].sizes), num_layers)  # (depth choices, layers)
        for row, depth in zip(self.keep, self.slots[-1].sizes, strict=True):
            row[list(self.depth_ranking[:depth])] = 1
        # Per slot: a submodel may take one of the first so many choices. Only depth may allow fewer than all.
        self.num_servable = [len(slot.sizes) for slot in self.slots]
        self.num_servable[-1] = self._num_servable_depths()
        self.slot_masks = [self.keep if slot.axis == "depth" else self.masks(slot) for slot in self.slots]

    def _slots(self, axis: str, choices: Choices, where: str) -> list[Slot]:
        """The slots of one axis: one per layer, one for the whole model, or none where the parent lacks the axis."""
        field = FIELDS.get(axis, axis)  # the configuration's field; depth has the same name in both
        if axis == "depth":
            full, keys, groups, smallest = architectures.num_layers(self.config), ("depth",), 1, 1
        else:
            keys = tuple(keys_of(self.units, axis))
            if not keys:  # the parent has no layers with this axis
                known = field not in EXPERTS or getattr(choices, field) is None
                require(known, f"{where}.{field}", getattr(choices, field), "null, because the parent has no experts")
                return []
            units = self.units[keys[0]]
            full, groups, smallest = units.size, units.groups, units.least
        sizes = getattr(choices, field) or (full,)
        multiples = f", in multiples of {groups}" if groups > 1 else ""
        multiples += f", {smallest} or more" if smallest > 1 else ""
        valid = all(smallest <= size <= full and size % groups == 0 for size in sizes)
        if sizes[0] != full or list(sizes) != sorted(set(sizes), reverse=True) or not valid:
            raise ConfigError(
                f"{where}.{field}: got {list(sizes)}; allowed: different sizes, largest first, "
                f"starting with the parent's own {full}{multiples}"
            )
        per_layer = field in choices.heterogeneous
        return [Slot(axis, (key,), sizes) for key in keys] if per_layer else [Slot(axis, keys, sizes)]

    def _num_servable_depths(self) -> int:
        """How many depths, from the largest on, keep a layer without which transformers has no cache for generation.

        All of them, if transformers has no cache even for the parent.
        """
        architecture, layers = architectures.of(self.config), self.depth_ranking
        depths = self.slots[-1].sizes
        if not architecture.can_cache(self.config, layers):
            return len(depths)
        return sum(architecture.can_cache(self.config, layers[:depth]) for depth in depths)

    def cost(self, probs: list[Tensor]) -> Tensor:
        """The expected cost () of a distribution, C(a) of eq. 12. It is differentiable.

        Slots are independent, so for a metric that is multilinear in the sizes, such as the number of parameters, this
        is the cost at the expected sizes, where each layer counts with the probability that depth keeps it.
        """
        sizes = {}
        for slot, prob in zip(self.slots, probs, strict=True):
            expected = prob @ torch.tensor(slot.sizes, dtype=prob.dtype)
            sizes.update(dict.fromkeys(slot.keys, expected))
        return expected_cost(self.metric, self.config, sizes, probs[-1] @ self.keep.to(probs[-1].dtype))

    def exact_cost(self, indices: list[int]) -> float:
        """The cost of one combination."""
        return self.costs(torch.tensor([indices])).item()

    def costs(self, indices: Tensor) -> Tensor:
        """The costs of many combinations at once: (N, slots) int64 → (N,) float64."""
        sizes = {}
        for slot, column in zip(self.slots, indices.T, strict=True):
            sizes.update(dict.fromkeys(slot.keys, torch.tensor(slot.sizes, dtype=torch.float64)[column]))
        return expected_cost(self.metric, self.config, sizes, self.keep.double()[indices[:, -1]].T)

    def grid_costs(self, slots: list[Slot] | None = None) -> Tensor:
        """The cost of every combination of `slots`, float64, with one dimension per slot.

        `slots` None: those of `axis_slots`, so per-layer choices are the same in all layers.
        """
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
        """One slot per axis, as if every axis had one choice for the whole model."""
        merged: dict[str, Slot] = {}
        for slot in self.slots:
            keys = merged[slot.axis].keys if slot.axis in merged else ()
            merged[slot.axis] = Slot(slot.axis, keys + slot.keys, slot.sizes)
        return list(merged.values())

    def masks(self, slot: Slot) -> Tensor:
        """The masks I_i of a slot's choices: (choices, units). Row i is 1 for the kept units and 0 for the others.

        Kept are the first sizes[i] units; where units have groups, the first sizes[i] / groups of every group.
        """
        units = self.units[slot.keys[0]]
        masks = torch.zeros(len(slot.sizes), units.size)
        for row, size in zip(masks, slot.sizes, strict=True):
            row[units.prefix(size)] = 1
        return masks

    def soft_gates(self, probs: list[Tensor]) -> dict[str, Tensor]:
        """The gates of the soft mode (eqs. 21–35): Σ_i π_i·I_i (units,) per unit key.

        ``depth`` (layers,) holds, for each layer, the probability that it is kept.
        """
        gates = {}
        for slot, prob, masks in zip(self.slots, probs, self.slot_masks, strict=True):
            gates.update(dict.fromkeys(slot.keys, prob @ masks))
        return gates

    def hard_gates(self, probs: list[Tensor], indices: list[int]) -> dict[str, Tensor]:
        """The straight-through gates of the hard mode: π_i / stop_gradient(π_i), one scalar per unit key.

        Their value is 1. They pass the gradient to the router. ``depth`` is (layers,).
        """
        gates = {}
        for slot, prob, index in zip(self.slots, probs, indices, strict=True):
            gate = prob[index] / prob[index].detach()
            if slot.axis == "depth":
                gate = gate.expand(self.keep.shape[1])
            gates.update(dict.fromkeys(slot.keys, gate))
        return gates

    def submodel(self, indices: list[int]) -> Submodel:
        """The submodel of one combination."""
        chosen = zip(self.slots, indices, strict=True)
        return self.submodel_of_sizes({key: slot.sizes[index] for slot, index in chosen for key in slot.keys})

    def submodel_of_sizes(self, sizes: dict[str, int]) -> Submodel:
        """The submodel with a size for every unit key and for ``depth``. They need not be sizes of the slots."""
        fields = {"kept_layers": self.depth_ranking[: sizes["depth"]]}
        for name, axis in WIDTHS.items():
            if keys := keys_of(self.units, axis):
                values = tuple(sizes[key] for key in keys)
                fields[name] = values if name in PER_LAYER else values[0]
        return Submodel(**fields).resolve(self.config)


def _check_expert_rows(config, choices: Choices, where: str) -> None:
    """Raise ConfigError if transformers can run the experts of the parent, but not those of a submodel of this size."""
    row_lengths = {"moe_intermediate_size": config.moe_intermediate_size}
    if getattr(config, "moe_latent_size", None) is None:
        row_lengths["hidden_size"] = config.hidden_size
    for name, full in row_lengths.items():
        for size in getattr(choices, name) or ():
            allowed = f"multiples of {EXPERT_ROW_MULTIPLE} (transformers' grouped matrix products of experts need them)"
            valid = full % EXPERT_ROW_MULTIPLE != 0 or size % EXPERT_ROW_MULTIPLE == 0
            require(valid, f"{where}.{name}", size, allowed)


def _check_expressible(config, choices: Choices, where: str) -> None:
    """Raise ConfigError for choices that a model directory of the parent's architecture cannot express."""
    architecture = architectures.of(config)
    if architectures.has_experts(config):
        _check_expert_rows(config, choices, where)
    if architecture.MODELING_FILE is None:
        for name in choices.heterogeneous:
            require(
                name == "intermediate_size", f"{where}.heterogeneous", name, f"intermediate_size ({config.model_type})"
            )
    for hidden_size in choices.hidden_size or (config.hidden_size,):
        for num_heads in choices.num_attention_heads or (config.num_attention_heads,):
            problem = architecture.size_problem(config, hidden_size, num_heads)
            if problem is not None:
                raise ConfigError(f"{where}.{problem}")
