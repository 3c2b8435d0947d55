"""Named dimensions: the rows of every tensor that belong to each unit of each elastic axis.

The `parameter_layout` of an architecture (architectures/) describes every dimension of every parameter once. Sorting,
slicing, extraction, parameter counts and the checks of nestedness all use this one table. No other code knows sizes or
the order of rows.

- A *unit key* names one elastic width: ``hidden`` for the whole model, and for each layer i of the parent ``ffn.i``,
  ``mamba_heads.i``, ``mamba_channels.i``, ``attention_heads.i``, ``experts.i``, ``expert_ffn.i`` (neurons of every
  routed expert) and ``shared_ffn.i``.
- *Sizes* map unit keys to the number of units that are kept.
- A *pick* maps unit keys to the indices of the units that are kept, in their new order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fixed:
    """A dimension that is never narrowed."""

    size: int

    def leaves(self) -> Iterator[Units]:
        return iter(())

    def count(self, sizes: Mapping):
        return self.size

    def rows(self, pick: Mapping[str, Tensor]) -> Tensor:
        return torch.arange(self.size)


@dataclass(frozen=True)
class Units:
    """The units of one elastic width.

    Units are stored group by group, and every group keeps the same number. `least` is the smallest size with which a
    model works, a multiple of `groups`.
    """

    key: str
    size: int
    groups: int = 1
    least: int = 1

    def leaves(self) -> Iterator[Units]:
        yield self

    def count(self, sizes: Mapping):
        return sizes.get(self.key, self.size)

    def rows(self, pick: Mapping[str, Tensor]) -> Tensor:
        return pick.get(self.key, torch.arange(self.size))

    def prefix(self, size: int) -> Tensor:
        """The indices of the kept units: the first size/groups units of every group."""
        return torch.arange(self.size).view(self.groups, -1)[:, : size // self.groups].flatten()


@dataclass(frozen=True)
class Compound:
    """A dimension that consists of other dimensions."""

    parts: tuple

    def leaves(self) -> Iterator[Units]:
        for part in self.parts:
            yield from part.leaves()


class Product(Compound):
    """One row for every combination of the parts' units; the index of the last part changes fastest."""

    @property
    def size(self) -> int:
        return functools.reduce(lambda total, part: total * part.size, self.parts, 1)

    def count(self, sizes: Mapping):
        return functools.reduce(lambda total, part: total * part.count(sizes), self.parts, 1)

    def rows(self, pick: Mapping[str, Tensor]) -> Tensor:
        rows = torch.zeros(1, dtype=torch.int64)
        for part in self.parts:
            rows = (rows[:, None] * part.size + part.rows(pick)).flatten()
        return rows


class Concat(Compound):
    """The rows of the parts, one part after the other."""

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def count(self, sizes: Mapping):
        return sum(part.count(sizes) for part in self.parts)

    def rows(self, pick: Mapping[str, Tensor]) -> Tensor:
        pieces, start = [], 0
        for part in self.parts:
            pieces.append(part.rows(pick) + start)
            start += part.size
        return torch.cat(pieces)


Dim = Fixed | Units | Product | Concat
Layout = dict[str, tuple[Dim, ...]]


def layer_index(name: str) -> int | None:
    """The layer of a parameter, by its name; None for embeddings, final norm and head."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def layer_of(key: str) -> int | None:
    """The layer of a unit key; None for ``hidden``, which belongs to the whole model."""
    _, _, layer = key.partition(".")
    return int(layer) if layer else None


def is_stack(dims: tuple[Dim, ...]) -> bool:
    """Whether a parameter has one matrix for each expert of a layer: (experts, rows, columns)."""
    return len(dims) == 3 and isinstance(dims[0], Units) and dims[0].key.startswith("experts.")


def is_matrix(dims: tuple[Dim, ...]) -> bool:
    """Whether a parameter is a matrix or a stack of matrices; the kernel of a convolution is not."""
    return len(dims) == 2 or is_stack(dims)


def elastic_keys(dim: Dim) -> tuple[str, ...]:
    """The different unit keys of a dimension, in the order of first use."""
    return tuple(dict.fromkeys(leaf.key for leaf in dim.leaves()))


def elastic_units(layout: Layout) -> dict[str, Units]:
    """The units of every unit key in a layout, in the order of first use."""
    return {leaf.key: leaf for dims in layout.values() for dim in dims for leaf in dim.leaves()}


@functools.lru_cache(maxsize=4096)
def _kept_rows(dim: Dim, sizes: tuple[int, ...]) -> int | Tensor:
    """See `kept_rows`; `sizes` are in the order of dim.leaves()."""
    # The cache outlives the context of the first caller. An index that was created in inference mode or on the meta
    # device could not be used in a later training step.
    with torch.inference_mode(False), torch.device("cpu"):
        pick = {leaf.key: leaf.prefix(size) for leaf, size in zip(dim.leaves(), sizes, strict=True)}
        rows = dim.rows(pick)
        is_prefix = torch.equal(rows, torch.arange(len(rows)))
    return len(rows) if is_prefix else rows


def kept_rows(dim: Dim, sizes: Mapping[str, int]) -> int | Tensor:
    """The rows of `dim` that are kept at `sizes`: the number n if they are the prefix [:n], else an int64 index."""
    return _kept_rows(dim, tuple(sizes.get(leaf.key, leaf.size) for leaf in dim.leaves()))


def rows_key(dim: Dim, sizes: Mapping[str, int]) -> tuple:
    """What `kept_rows` depends on. It is equal for the same dimension of layers with equal sizes."""
    if isinstance(dim, Fixed):
        return (dim.size,)
    if isinstance(dim, Units):
        return dim.size, dim.groups, sizes.get(dim.key, dim.size)
    return type(dim), *(rows_key(part, sizes) for part in dim.parts)


def narrow(tensor: Tensor, dims: tuple[Dim, ...], sizes: Mapping[str, int]) -> Tensor:
    """Narrow every dimension of `tensor` to `sizes`: a view where the kept rows are a prefix, else a gather."""
    return take(tensor, [kept_rows(dim, sizes) for dim in dims])


def take(tensor: Tensor, rows_of_axes: Iterable[int | Tensor]) -> Tensor:
    """Narrow every dimension of `tensor` to the given rows, each in the form that `kept_rows` returns."""
    gathers = []
    for axis, rows in enumerate(rows_of_axes):
        if isinstance(rows, Tensor):
            gathers.append((axis, rows))
        elif rows != tensor.shape[axis]:
            tensor = tensor.narrow(axis, 0, rows)
    for axis, rows in gathers:  # after the views, so that less is copied
        tensor = tensor.index_select(axis, rows.to(tensor.device))
    return tensor


def permute(tensor: Tensor, dims: tuple[Dim, ...], orders: Mapping[str, Tensor]) -> Tensor:
    """Reorder every dimension by the rankings of its units; `orders` maps unit keys to permutations (size,).

    For neurons of experts, the ranking has one permutation per expert, (experts, neurons). Its row i is the expert that
    has the number i before the experts themselves are reordered.
    """
    for axis, dim in enumerate(dims):
        if isinstance(dim, Units) and dim.key in orders and orders[dim.key].dim() == 2:
            shape = [-1 if i in (0, axis) else 1 for i in range(len(dims))]
            tensor = tensor.take_along_dim(orders[dim.key].view(dims[0].size, *shape[1:]).to(tensor.device), axis)
    shared = {key: order for key, order in orders.items() if order.dim() == 1}  # the same for all experts
    for axis, dim in enumerate(dims):
        if any(leaf.key in shared for leaf in dim.leaves()):
            tensor = tensor.index_select(axis, dim.rows(shared).to(tensor.device))
    return tensor


def count(layout: Layout, sizes: Mapping, keep: Callable[[int], object]):
    """The number of parameters of a layout at `sizes`; `keep(i)` is 1, 0, or the probability that layer i is kept.

    With integer sizes, the count is exact. With tensors of expected sizes, it is differentiable and is the expected
    count if the sizes are independent, because the count is multilinear in the sizes.
    """
    total = 0
    for name, dims in layout.items():
        layer = layer_index(name)
        size = functools.reduce(lambda product, dim: product * dim.count(sizes), dims, 1)
        total = total + (size if layer is None else size * keep(layer))
    return total
