"""Adopt a nested checkpoint that another program has trained: check the sizes of its members, and write elastic.json.

A member keeps the first units of every width. What "the first" is can differ for heads. This library keeps the first
k of every group: SSM groups, or the query heads of a key-value head. A program that trains with tensor parallelism may
keep the first k of every shard instead. Losses on a text tell which of the two a checkpoint needs.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_core.cost.metrics import num_parameters
from elastic_core.errors import UserError, named
from elastic_core.export import elastic_checkpoint
from elastic_core.export.extract import SlicedTensor, config_changes
from elastic_core.io.atomic import check_apart, whole_directory
from elastic_core.io.tokenizer_files import MORE_TEMPLATES
from elastic_core.model import architectures, hf
from elastic_core.model.dims import Units
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.model.files.experts import is_stacked, matrices, matrix_name
from elastic_core.model.submodel import Submodel
from elastic_core.search.selection import Member

BY_GROUP = 0  # a head order: the first heads of every group. Any other head order is a number of shards
MOST_SHARDS = 64
HEAD_FIELDS = {"mamba_heads": "mamba_num_heads", "attention_heads": "num_attention_heads"}


def check_members(config, members: Mapping[str, Submodel]) -> dict[str, Submodel]:
    """The members with all of their sizes, largest first.

    Raises UserError for sizes that the model cannot have or that no exported model can have, for two members of the
    same sizes, and for members that are not nested.
    """
    if not members:
        raise UserError("got no members; allowed: one or more, each with a name")
    found = {}
    for name, submodel in members.items():
        with named(name):
            found[name] = submodel.resolve(config)
            config_changes(config, found[name], pad=architectures.of(config).MODELING_FILE is None)
    ordered = sorted(found, key=lambda name: -num_parameters(config, found[name]))
    for larger, smaller in itertools.pairwise(ordered):
        if found[larger] == found[smaller]:
            raise UserError(f"{smaller}: has the same sizes as {larger}; allowed: every member once")
        if not found[smaller].is_within(found[larger], config):
            raise UserError(
                f"{smaller}: got {found[smaller]}, which is not nested in {larger} ({found[larger]}); allowed: layers "
                "and sizes that the next larger member has too"
            )
    return {name: found[name] for name in ordered}


# --- which heads come first --------------------------------------------------------------------------------------


def head_units(config) -> dict[str, Units]:
    """The unit keys of all heads."""
    return {key: unit for key, unit in architectures.units(config).items() if key.partition(".")[0] in HEAD_FIELDS}


def kept_heads(units: Units, size: int, order: int) -> Tensor | None:
    """Which heads (units.size,) bool a member of `size` heads keeps in a head order; None where the order cannot be."""
    if order == BY_GROUP:
        mask = torch.zeros(units.size, dtype=torch.bool)
        mask[units.prefix(size)] = True
        return mask
    if units.size % order or size % order:
        return None
    return (torch.arange(units.size) % (units.size // order)) < size // order


def possible_orders(config, members: Mapping[str, Submodel], first: int = BY_GROUP) -> list[int]:
    """The head orders that the sizes allow and that differ in the heads of at least one member. `first` comes first.

    A single order if no member drops heads: then all are the same.
    """
    units, found = head_units(config), {}
    for order in (first, BY_GROUP, *range(1, MOST_SHARDS + 1)):
        masks = [
            kept_heads(units[key], sizes[key], order)
            for sizes in (member.sizes(config) for member in members.values())
            for key in units
        ]
        if all(mask is not None for mask in masks):
            found.setdefault(tuple(tuple(mask.tolist()) for mask in masks), order)
    return list(found.values())


def is_expressible(config, members: Mapping[str, Submodel], order: int) -> bool:
    """Whether every group keeps the same number of heads in a head order. No model directory can express another."""
    for member in members.values():
        sizes = member.sizes(config)
        for key, units in head_units(config).items():
            mask = kept_heads(units, sizes[key], order)
            if mask is None or len(set(mask.view(units.groups, -1).sum(-1).tolist())) > 1:
                return False
    return True


def sorted_orders(config, members: Mapping[str, Submodel], order: int) -> dict[str, Tensor]:
    """For every unit key of heads, the permutation after which the first heads of every group are those of `order`."""
    orders = {}
    for key, units in head_units(config).items():
        keeping = torch.zeros(units.size)  # by how many members each head is kept
        for member in members.values():
            keeping += kept_heads(units, member.sizes(config)[key], order)
        within = keeping.view(units.groups, -1).argsort(dim=-1, descending=True, stable=True)
        starts = torch.arange(0, units.size, units.size // units.groups)[:, None]
        permutation = (within + starts).flatten()
        if not torch.equal(permutation, torch.arange(units.size)):
            orders[key] = permutation
    return orders


# --- losses ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def losses(model: ElasticModel, members: Mapping[str, Submodel], input_ids: Tensor, order: int) -> dict[str, float]:
    """Mean loss in nats per token of every member in a head order, on `input_ids` (B, L) int64. All are predicted."""
    return {name: _loss(model, member, input_ids, order) for name, member in members.items()}


def _loss(model: ElasticModel, member: Submodel, input_ids: Tensor, order: int) -> float:
    """Unless the order is BY_GROUP, heads are not sliced but multiplied by 0 or 1, so that any can be kept."""
    gates = {}
    if order != BY_GROUP:
        sizes = member.sizes(model.config)
        gates = {key: kept_heads(units, sizes[key], order).float() for key, units in head_units(model.config).items()}
        member = dataclasses.replace(member, **dict.fromkeys(HEAD_FIELDS.values()))
    sliced, total = model.slice(member, gates), 0.0
    for row in input_ids:  # one at a time: the logits of a row are the largest tensor
        logits = F.linear(model.hidden_states(row[None, :-1], sliced), model.head(sliced))
        total += F.cross_entropy(logits[0].float(), row[1:], reduction="sum").item()
    return total / (input_ids.shape[0] * (input_ids.shape[1] - 1))


# --- writing ---------------------------------------------------------------------------------------------------------


def write(directory: str | os.PathLike, config, members: Mapping[str, Submodel]) -> None:
    """Write the elastic.json of a checkpoint with these members, largest first. Nothing lies between them."""
    full = num_parameters(config)
    shares = {name: round(num_parameters(config, member) / full, 4) for name, member in members.items()}
    entries = {name: Member(shares[name], member) for name, member in members.items()}
    elastic_checkpoint.write(directory, config, entries, [])


def write_sorted(
    directory: str | os.PathLike, out: str | os.PathLike, config, members: Mapping[str, Submodel], order: int
) -> None:
    """Write the elastic checkpoint `out`: a copy of `directory` whose heads are sorted by `sorted_orders`.

    Its weights are read and written in blocks. The copy computes the same as the original. `out` appears complete,
    and replaces an existing one. Raises UserError if it is not apart from `directory`.
    """
    check_apart(out, [directory])
    orders, reader, tensors = sorted_orders(config, members, order), hf.TensorReader(directory), {}
    disk_name = architectures.of(config).disk_name
    for name, dims in architectures.parameter_layout(config).items():
        rows = [dim.rows(orders) if any(leaf.key in orders for leaf in dim.leaves()) else dim.size for dim in dims]
        stored, shape = reader.stored(name), tuple(dim.size for dim in dims)
        if is_stacked(name):
            for number, matrix in enumerate(matrices(stored)):
                tensors[disk_name(matrix_name(name, number))] = SlicedTensor(matrix, rows[1:], shape[1:], None)
        else:
            tensors[disk_name(name)] = SlicedTensor(stored, rows, shape, None)
    with whole_directory(out) as partial:
        for path in Path(directory).iterdir():
            if path.is_file() and not path.name.endswith((".safetensors", ".safetensors.index.json")):
                shutil.copyfile(path, partial / path.name)
        if (Path(directory) / MORE_TEMPLATES).is_dir():
            shutil.copytree(Path(directory) / MORE_TEMPLATES, partial / MORE_TEMPLATES)
        hf.write_tensors(partial, {name: tensor.entry for name, tensor in tensors.items()}, tensors.items())
        write(partial, config, members)
