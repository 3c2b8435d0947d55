"""Submodel: the sizes of one nested model."""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass

from elastic_core.layout import block_pattern, elastic_units, layers_of, parameter_layout

# Submodel field → pattern character of the layers it belongs to (None: the whole model) and unit key.
WIDTHS = {
    "hidden_size": (None, "hidden"),
    "intermediate_size": ("-", "ffn"),
    "mamba_num_heads": ("M", "mamba_heads"),
    "mamba_head_dim": ("M", "mamba_channels"),
    "num_attention_heads": ("*", "attention_heads"),
}
PER_LAYER = ("intermediate_size", "mamba_num_heads", "num_attention_heads")

Width = int | tuple[int, ...] | None


@dataclass(frozen=True)
class Submodel:
    """Sizes of one nested model; None stands for the parent's own size.

    `kept_layers` are indices into the parent's layers. A width in `PER_LAYER` is an int for all layers, or one entry
    per parent layer of its type (entries of dropped layers are ignored). Hashable; lists become tuples.
    """

    hidden_size: int | None = None
    kept_layers: tuple[int, ...] | None = None
    intermediate_size: Width = None
    mamba_num_heads: Width = None
    mamba_head_dim: int | None = None
    num_attention_heads: Width = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                plain = value if value is None else _as_ints(value)
            except TypeError:
                raise ValueError(f"{field.name}: got {value!r}; allowed: an integer, or a list of integers") from None
            object.__setattr__(self, field.name, plain)

    def resolve(self, config) -> Submodel:
        """The same submodel with every size said and checked against the parent's `config`.

        Per-layer widths that are equal in all kept layers become one int, and entries of dropped layers the parent's
        size, so that equal models compare equal.
        Raises ValueError for a size that the parent cannot give.
        """
        kept = self._checked_layers(config)
        fields = {"kept_layers": kept}
        for name, (character, axis) in WIDTHS.items():
            full = getattr(config, name)
            value = getattr(self, name)
            value = full if value is None else value
            if isinstance(value, tuple):
                value = self._checked_entries(config, name, character, value, kept)
            for size in value if isinstance(value, tuple) else (value,):
                _check_size(config, name, axis, size, full)
            fields[name] = value
        return Submodel(**fields)

    def sizes(self, config) -> dict[str, int]:
        """Kept size of every unit key of the layout (of dropped layers too, where they do not matter)."""
        resolved, sizes = self.resolve(config), {}
        for name, (character, axis) in WIDTHS.items():
            value = getattr(resolved, name)
            if character is None:
                sizes[axis] = value
                continue
            layers = layers_of(config, character)
            values = value if isinstance(value, tuple) else (value,) * len(layers)
            sizes.update({f"{axis}.{i}": size for i, size in zip(layers, values, strict=True)})
        return sizes

    def is_within(self, other: Submodel, config) -> bool:
        """Whether every parameter of this submodel is a parameter of `other` too."""
        mine, theirs = self.resolve(config), other.resolve(config)
        my_sizes, their_sizes = mine.sizes(config), theirs.sizes(config)
        kept = set(mine.kept_layers)
        used = {key for key in my_sizes if key == "hidden" or int(key.split(".")[1]) in kept}
        return kept <= set(theirs.kept_layers) and all(my_sizes[key] <= their_sizes[key] for key in used)

    @property
    def is_homogeneous(self) -> bool:
        """Whether no width differs between layers (say it of a resolved submodel)."""
        return not any(isinstance(getattr(self, name), tuple) for name in PER_LAYER)

    def to_dict(self) -> dict:
        """Plain JSON values; `Submodel(**values)` reads them back."""
        return dataclasses.asdict(self)

    def _checked_layers(self, config) -> tuple[int, ...]:
        num_layers = len(block_pattern(config))
        kept = tuple(range(num_layers)) if self.kept_layers is None else self.kept_layers
        if (
            isinstance(kept, int)
            or not kept
            or any(not 0 <= i < num_layers for i in kept)
            or len(set(kept)) < len(kept)
        ):
            raise ValueError(
                f"kept_layers: got {kept}; allowed: one or more different indices in 0..{num_layers - 1} of the parent"
            )
        return tuple(sorted(kept))

    @staticmethod
    def _checked_entries(config, name, character, value, kept) -> Width:
        if name not in PER_LAYER:
            raise ValueError(f"{name}: got {value}; allowed: one size for the whole model")
        layers = layers_of(config, character)
        if len(value) != len(layers):
            raise ValueError(
                f"{name}: got {len(value)} entries; allowed: one size, or one per parent layer of type "
                f"{character!r}, of which there are {len(layers)}"
            )
        live = {size for i, size in zip(layers, value, strict=True) if i in kept}
        full = getattr(config, name)
        if len(live) <= 1:
            return live.pop() if live else full
        return tuple(size if i in kept else full for i, size in zip(layers, value, strict=True))


def _as_ints(value) -> int | tuple[int, ...]:
    """An int for an int of any make, a tuple for a sequence of them; TypeError for what would have to be rounded."""
    try:
        return operator.index(value)
    except TypeError:
        return tuple(operator.index(item) for item in value)


def _check_size(config, name: str, axis: str, size: int, full: int) -> None:
    groups = {"mamba_heads": config.n_groups, "attention_heads": config.num_key_value_heads}.get(axis, 1)
    if not 1 <= size <= full or size % groups:
        multiple = f", multiples of {groups} (every group keeps as many)" if groups > 1 else ""
        raise ValueError(f"{name}: got {size}; allowed: {groups} to {full}, the parent's own{multiple}")


def full_submodel(config) -> Submodel:
    """The parent's own architecture."""
    return Submodel().resolve(config)


def full_sizes(config) -> dict[str, int]:
    """Full size of every unit key."""
    return {key: unit.size for key, unit in elastic_units(parameter_layout(config)).items()}
