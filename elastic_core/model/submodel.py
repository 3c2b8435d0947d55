"""Submodel: the sizes of one submodel, and their check against the parent."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from dataclasses import dataclass

from elastic_core.errors import UserError
from elastic_core.model import architectures
from elastic_core.model.axes import EXPERTS, PER_LAYER, TITLES, WIDTHS
from elastic_core.model.dims import Units, layer_of

Width = int | tuple[int, ...] | None


@dataclass(frozen=True)
class Submodel:
    """The sizes of one submodel; None means the parent's own size.

    - `kept_layers` are indices of the parent's layers.
    - A width in `PER_LAYER` is one int for all layers, or a list with one entry for every layer of the parent that has
      this width. Entries of dropped layers are ignored.
    - A width that the parent does not have, such as widths of experts, stays None.

    Hashable; lists become tuples. Raises UserError for sizes that are not integers.
    """

    hidden_size: int | None = None
    kept_layers: tuple[int, ...] | None = None
    intermediate_size: Width = None
    mamba_num_heads: Width = None
    mamba_head_dim: int | None = None
    num_attention_heads: Width = None
    num_experts: int | None = None
    moe_intermediate_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                integers = value if value is None else _as_ints(value)
            except TypeError:
                raise UserError(f"{field.name}: got {value!r}; allowed: an integer, or a list of integers") from None
            object.__setattr__(self, field.name, integers)  # the dataclass is frozen

    def resolve(self, config) -> Submodel:
        """The same submodel with explicit sizes, checked against the parent's `config`.

        Equal models get equal sizes: a list of widths that are equal in all kept layers becomes one int, and entries of
        dropped layers become the parent's size.
        Raises UserError for a size that this parent cannot have.
        """
        kept, units = self._checked_layers(config), architectures.units(config)
        fields = {"kept_layers": kept}
        for name, axis in WIDTHS.items():
            keys = keys_of(units, axis)
            full = units[keys[0]].size if keys else _size_without_layers(config, name)
            value = getattr(self, name)
            value = full if value is None else value
            if isinstance(value, tuple):
                value = self._checked_entries(name, keys, value, kept, full)
            for size in value if isinstance(value, tuple) else (value,):
                _check_size(name, size, full, units[keys[0]] if keys else Units(name, full or 1))
            fields[name] = value
        return Submodel(**fields)

    def sizes(self, config) -> dict[str, int]:
        """The kept size of every unit key; dropped layers are included, but their sizes have no effect."""
        resolved, units, sizes = self.resolve(config), architectures.units(config), {}
        for name, axis in WIDTHS.items():
            value, keys = getattr(resolved, name), keys_of(units, axis)
            values = value if isinstance(value, tuple) else (value,) * len(keys)
            sizes.update(zip(keys, values, strict=True))
        return sizes

    def is_within(self, other: Submodel, config) -> bool:
        """Whether every parameter of this submodel is also a parameter of `other`."""
        mine, theirs = self.resolve(config), other.resolve(config)
        my_sizes, their_sizes = mine.sizes(config), theirs.sizes(config)
        kept = set(mine.kept_layers)
        used = {key for key in my_sizes if layer_of(key) is None or layer_of(key) in kept}
        return kept <= set(theirs.kept_layers) and all(my_sizes[key] <= their_sizes[key] for key in used)

    @property
    def is_homogeneous(self) -> bool:
        """Whether every width is equal in all layers. Ask a resolved submodel (`resolve`)."""
        return not any(isinstance(getattr(self, name), tuple) for name in PER_LAYER)

    def __str__(self) -> str:
        """The sizes for people, such as ``7 layers (0-5, 7), hidden 72, MLP 192, attention heads 2``."""
        parts = [] if self.kept_layers is None else [f"{len(self.kept_layers)} layers ({_ranges(self.kept_layers)})"]
        for name, title in TITLES.items():
            value = getattr(self, name)
            if value is not None:
                parts.append(f"{title} " + ("/".join(map(str, value)) if isinstance(value, tuple) else str(value)))
        return ", ".join(parts) or "the whole parent"

    def to_dict(self) -> dict:
        """JSON values that `Submodel(**values)` reads. Widths of experts are left out if they are None."""
        return {
            name: value for name, value in dataclasses.asdict(self).items() if value is not None or name not in EXPERTS
        }

    def _checked_layers(self, config) -> tuple[int, ...]:
        num_layers = architectures.num_layers(config)
        kept = tuple(range(num_layers)) if self.kept_layers is None else self.kept_layers
        if (
            isinstance(kept, int)
            or not kept
            or any(not 0 <= i < num_layers for i in kept)
            or len(set(kept)) < len(kept)
        ):
            raise UserError(
                f"kept_layers: got {kept}; allowed: one or more different indices in 0..{num_layers - 1} of the parent"
            )
        return tuple(sorted(kept))

    @staticmethod
    def _checked_entries(name: str, keys: list[str], value: tuple[int, ...], kept, full: int) -> Width:
        if name not in PER_LAYER:
            raise UserError(f"{name}: got {value}; allowed: one size for the whole model")
        if len(value) != len(keys):
            raise UserError(
                f"{name}: got {len(value)} entries; allowed: one size, or one for each layer of the parent with this "
                f"width; there are {len(keys)}"
            )
        entries = [(size, layer_of(key) in kept) for key, size in zip(keys, value, strict=True)]
        live = {size for size, is_kept in entries if is_kept}
        if len(live) <= 1:
            return live.pop() if live else full
        return tuple(size if is_kept else full for size, is_kept in entries)


def _ranges(numbers: tuple[int, ...]) -> str:
    """Ascending numbers with runs joined, such as ``0-5, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def keys_of(units: Mapping[str, Units], axis: str) -> list[str]:
    """The unit keys of one axis, sorted by layer."""
    return [key for key in units if key.partition(".")[0] == axis]


def _as_ints(value) -> int | tuple[int, ...]:
    """An int for an integer of any type (also numpy's), a tuple for a sequence of integers; else TypeError."""
    try:
        return operator.index(value)
    except TypeError:
        return tuple(operator.index(item) for item in value)


def _size_without_layers(config, name: str) -> int | None:
    """The full size of a width that no layer of the parent has: the value in its configuration, None for experts."""
    return None if name in EXPERTS else getattr(config, name, None)


def _check_size(name: str, size: int | None, full: int | None, units: Units) -> None:
    groups, least = units.groups, max(units.groups, units.least)
    if full is None:
        if size is not None:
            raise UserError(f"{name}: got {size}; allowed: nothing, this parent has no such width")
    elif not least <= size <= full or size % groups:
        multiple = f", multiples of {groups} (every group keeps the same number)" if groups > 1 else ""
        raise UserError(f"{name}: got {size}; allowed: {least} to {full}, the parent's own{multiple}")


def full_submodel(config) -> Submodel:
    """The submodel that is the whole parent."""
    return Submodel().resolve(config)


def full_sizes(config) -> dict[str, int]:
    """The parent's size of every unit key."""
    return {key: unit.size for key, unit in architectures.units(config).items()}
