"""Named dimensions: which rows of which tensor belong to which unit of which elastic axis.

Every dimension of every parameter is described once, in the `parameter_layout` of its family (families/). Sorting,
slicing, extraction, parameter counts and nestedness are all readings of that one table; nothing about sizes or row
order is written anywhere else.

A *unit key* names one elastic width: ``hidden`` for the whole model, and per parent layer i ``ffn.i``,
``mamba_heads.i``, ``mamba_channels.i``, ``attention_heads.i``, ``experts.i``, ``expert_ffn.i`` (neurons of every routed
expert) and ``shared_ffn.i``. *Sizes* map unit keys to kept sizes; a *pick* maps unit keys to the kept units themselves,
in the order in which they are to stand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fixed:
    """Rows that no axis cuts."""

    size: int

    def leaves(self) -> Iterator[Units]:
        return iter(())

    def count(self, sizes: Mapping):
        return self.size

    def rows(self, pick: Mapping[str, Tensor]) -> Tensor:
        return torch.arange(self.size)


@dataclass(frozen=True)
class Units:
    """The units of one elastic width. With `groups`, units stand group by group and every group keeps as many.

    `least`: the fewest that a model can do with, a multiple of `groups`.
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
        """The first `size` units: the first size/groups of every group."""
        return torch.arange(self.size).view(self.groups, -1)[:, : size // self.groups].flatten()


@dataclass(frozen=True)
class Compound:
    """A dimension made of others."""

    parts: tuple

    def leaves(self) -> Iterator[Units]:
        for part in self.parts:
            yield from part.leaves()


class Product(Compound):
    """Rows indexed by several dimensions at once, the last one running fastest."""

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
    """Dimensions one after the other."""

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
    """The layer to which a parameter belongs, or None for embeddings, final norm and head."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def layer_of(key: str) -> int | None:
    """The layer to which a unit key belongs, or None for what the whole model shares."""
    _, _, layer = key.partition(".")
    return int(layer) if layer else None


def is_stack(dims: tuple[Dim, ...]) -> bool:
    """Whether a parameter holds a matrix for each of a layer's experts: (experts, rows, columns)."""
    return len(dims) == 3 and isinstance(dims[0], Units) and dims[0].key.startswith("experts.")


def is_matrix(dims: tuple[Dim, ...]) -> bool:
    """Whether tokens are multiplied with a parameter: a matrix or a stack of them, and no convolution's kernel."""
    return len(dims) == 2 or is_stack(dims)


def elastic_units(layout: Layout) -> dict[str, Units]:
    """Every unit key of a layout with its full size and groups, in the order of first use."""
    return {leaf.key: leaf for dims in layout.values() for dim in dims for leaf in dim.leaves()}


@functools.lru_cache(maxsize=4096)
def _kept_rows(dim: Dim, sizes: tuple[int, ...]) -> int | Tensor:
    """Kept rows as a number where they are a prefix, else as indices. `sizes` stand in the order of dim.leaves()."""
    # The cache outlives the caller's contexts: an index made under inference mode or on a meta device would be of no
    # use to the training step that finds it here.
    with torch.inference_mode(False), torch.device("cpu"):
        pick = {leaf.key: leaf.prefix(size) for leaf, size in zip(dim.leaves(), sizes, strict=True)}
        rows = dim.rows(pick)
        is_prefix = torch.equal(rows, torch.arange(len(rows)))
    return len(rows) if is_prefix else rows


def kept_rows(dim: Dim, sizes: Mapping[str, int]) -> int | Tensor:
    """The rows of `dim` that survive at `sizes`: a number n for the prefix [:n], else an int64 index tensor."""
    return _kept_rows(dim, tuple(sizes.get(leaf.key, leaf.size) for leaf in dim.leaves()))


def narrow(tensor: Tensor, dims: tuple[Dim, ...], sizes: Mapping[str, int]) -> Tensor:
    """Cut `tensor` to `sizes`: a view where the kept rows are a prefix, a gather where they are not."""
    return take(tensor, [kept_rows(dim, sizes) for dim in dims])


def take(tensor: Tensor, rows_of_axes: Iterable[int | Tensor]) -> Tensor:
    """The rows of every axis of `tensor`, each as `kept_rows` says them."""
    gathers = []
    for axis, rows in enumerate(rows_of_axes):
        if isinstance(rows, Tensor):
            gathers.append((axis, rows))
        elif rows != tensor.shape[axis]:
            tensor = tensor.narrow(axis, 0, rows)
    for axis, rows in gathers:  # after the views, so that they copy the least
        tensor = tensor.index_select(axis, rows.to(tensor.device))
    return tensor


def permute(tensor: Tensor, dims: tuple[Dim, ...], orders: Mapping[str, Tensor]) -> Tensor:
    """Reorder every dimension by the rankings of its units; `orders` maps unit keys to permutations.

    Neurons of experts have an order per expert, (experts, neurons), numbered as before the experts are reordered.
    """
    for axis, dim in enumerate(dims):
        if isinstance(dim, Units) and dim.key in orders and orders[dim.key].dim() == 2:
            shape = [-1 if i in (0, axis) else 1 for i in range(len(dims))]
            tensor = tensor.take_along_dim(orders[dim.key].view(dims[0].size, *shape[1:]).to(tensor.device), axis)
    one = {key: order for key, order in orders.items() if order.dim() == 1}
    for axis, dim in enumerate(dims):
        if any(leaf.key in one for leaf in dim.leaves()):
            tensor = tensor.index_select(axis, dim.rows(one).to(tensor.device))
    return tensor


def count(layout: Layout, sizes: Mapping, keep: Callable[[int], object]):
    """Parameters of a layout at `sizes`. `keep(i)` is 1 or 0, or the probability that layer i is kept.

    With int sizes the count is exact; with tensors it is differentiable, and the expectation where the sizes are
    independent (the count is multilinear in them).
    """
    total = 0
    for name, dims in layout.items():
        layer = layer_index(name)
        size = functools.reduce(lambda product, dim: product * dim.count(sizes), dims, 1)
        total = total + (size if layer is None else size * keep(layer))
    return total
