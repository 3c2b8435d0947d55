"""Sort a model by its ranking: the units of every axis in decreasing importance, and the residual stream in its basis.

The sorted model computes the same function as before, up to rounding. From then on, the k most important units of an
axis are its first k units.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from elastic_core.errors import UserError
from elastic_core.model import architectures
from elastic_core.model.dims import Layout, elastic_units, permute
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.model.norm_gains import NormRatios
from elastic_core.search.importance.basis import check_basis, rotated
from elastic_core.search.importance.ranking import Ranking


@torch.no_grad()
def sort_(model: ElasticModel, ranking: Ranking) -> ElasticModel:
    """Sort the weights in place. The model gets the norm ratios of the ranking, if it has some, for its submodels.

    Raises UserError if the ranking is not one of this model.
    """
    for name, tensor in sorted_tensors(model.config, model.get_parameter, ranking):
        model.get_parameter(name).copy_(tensor)
    model.norm_gains = NormRatios(ranking.norm_ratios) if ranking.norm_ratios else None
    return model


@torch.no_grad()
def sort_directory(
    source: str | os.PathLike, target: str | os.PathLike, ranking: Ranking, device: torch.device | None = None
) -> None:
    """Write the sorted model of the directory `source` as the directory `target`, tensor by tensor.

    Memory holds a few tensors. Tensors that are only permuted keep a bfloat16 type of the files. All others are in
    float32, because rotated weights would be rounded again in 16 bits. They are rotated on `device` (None: the CPU).
    Raises UserError if the ranking is not one of this model.
    """
    model, reader = ElasticModel.empty(source)
    keeps = torch.float32 if ranking.axes is not None else torch.bfloat16
    for name, parameter in model.named_parameters():
        stored = reader.stored(name).entry.dtype
        parameter.data = parameter.data.to(stored if stored == keeps else torch.float32)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    tensors = sorted_tensors(model.config, lambda name: reader.read(name).to(device, dtypes[name]), ranking)
    model.norm_gains = NormRatios(ranking.norm_ratios) if ranking.norm_ratios else None
    model.write(target, ((name, tensor.cpu()) for name, tensor in tensors), tokenizer_from=source)


@torch.no_grad()
def sorted_tensors(config, read: Callable[[str], Tensor], ranking: Ranking) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the sorted model, one by one, in the order of the layout: (name, tensor).

    `read(name)` returns a parameter of the model, such as `TensorReader.read`: so the model does not have to be in
    memory. Raises UserError if an order is not a permutation of the model's units, if it moves a unit to another group,
    or if the ranking has a basis or norm ratios of another model.
    """
    layout = architectures.parameter_layout(config)
    check_orders(layout, ranking)
    check_basis_and_ratios(config, ranking)
    gains = {name: read(name).clone() for name in architectures.norm_names(config)}
    # The order of a product's sums depends on the order in memory, and a saved ranking is row by row.
    axes = None if ranking.axes is None else ranking.axes.contiguous()
    for name, dims in layout.items():
        tensor = read(name)
        if axes is not None:
            tensor = rotated(config, name, tensor, axes, gains)
        yield name, permute(tensor, dims, ranking.orders)


def check_basis_and_ratios(config, ranking: Ranking) -> None:
    """Raise UserError unless basis and norm ratios, if the ranking has some, have the sizes and names of this model."""
    names, size = architectures.norm_names(config), config.hidden_size
    if ranking.axes is not None:
        check_basis(config)
        if ranking.axes.shape != (size, size) or not ranking.axes.isfinite().all():
            given = " × ".join(map(str, ranking.axes.shape))
            raise UserError(f"ranking: a basis of {given} numbers; this model needs {size} × {size} finite ones")
    if ranking.norm_ratios and ranking.norm_ratios.keys() != set(names):
        unknown = sorted(ranking.norm_ratios.keys() ^ set(names))
        raise UserError(f"ranking: norm ratios of another model: {', '.join(unknown[:3])}; rank this model again")
    for name, ratios in ranking.norm_ratios.items():
        if ratios.shape != (size,) or not ratios.isfinite().all():
            raise UserError(f"ranking: the norm ratios of {name} are not {size} finite numbers; rank this model again")


def check_orders(layout: Layout, ranking: Ranking) -> None:
    """Raise UserError unless every order is a permutation of the layout's units within their groups."""
    units = elastic_units(layout)
    for key, order in ranking.orders.items():
        if key not in units:
            raise UserError(f"ranking: key {key!r} is not in this model; rank it again with this model's configuration")
        groups = torch.arange(units[key].size) // (units[key].size // units[key].groups)
        rows = (units[key.replace("expert_ffn", "experts")].size,) if order.dim() == 2 else ()  # one row per expert
        shape = (*rows, units[key].size)
        all_units = torch.arange(units[key].size).expand(shape)
        is_permutation = order.shape == shape and torch.equal(order.sort().values, all_units)
        if not is_permutation or not torch.equal(groups[order], groups.expand(shape)):
            raise UserError(f"ranking: the order of {key!r} is not a permutation within the groups of this model")
