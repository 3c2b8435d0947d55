"""Extraction: write one submodel of an elastic checkpoint as an ordinary Hugging Face model directory.

It needs no training. Tensors are read, sliced and written in blocks of rows, so it needs little memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import resources
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_core.data import special_tokens
from elastic_core.errors import UserError, named
from elastic_core.export import elastic_checkpoint, model_card
from elastic_core.io.atomic import check_apart, whole_directory
from elastic_core.io.provenance_file import copy_provenance
from elastic_core.io.tensor_files import Entry, Stored
from elastic_core.model import architectures, hf, norm_gains
from elastic_core.model.axes import PER_LAYER, WIDTHS
from elastic_core.model.dims import kept_rows, layer_index, layer_of
from elastic_core.model.files.experts import is_stacked, matrices, matrix_name
from elastic_core.model.files.parent_dtype import parent_dtype, with_parent_dtype
from elastic_core.model.files.weights import shard_bytes
from elastic_core.model.submodel import Submodel, keys_of


def extract(
    elastic_directory: str | os.PathLike,
    submodel_or_budget: Submodel | str | float,
    out_directory: str | os.PathLike,
    heterogeneous: str = "remote_code",
    dtype: torch.dtype | None = None,
    name: str | None = None,
) -> Submodel:
    """Write a submodel of a checkpoint directory to `out_directory`, and return it with all of its sizes set.

    - `submodel_or_budget`: a Submodel; or, if the directory has an ``elastic.json``, a budget's name or target (see
      `elastic_checkpoint.find_submodel`).
    - `out_directory` appears when it is complete, and replaces an existing one. It must not be or
      contain the checkpoint.
    - `heterogeneous`: how to write widths that differ between layers. ``remote_code`` adds a modeling file; load the
      directory with ``trust_remote_code=True``. ``pad`` fills the MLPs with zeros up to the widest one. The result
      computes the same and loads everywhere. A homogeneous submodel needs neither: it is a stock directory.
    - `dtype`: the element type of the written tensors. None: that of the parent's files, if the family was made from
      an existing parent (parent_dtype.py), else as stored. A few small tensors stay in float32 (see `stored_in`).
    - `name`: the name of the budget in the model card (None: the budget as it was given).

    Norms have the gains of this submodel (norm_gains.py). The tokenizer and its chat template come along, and
    generation stops at the same tokens (see special_tokens.py).

    Raises UserError for wrong arguments, an unknown budget, or sizes that the architecture cannot express.
    """
    if heterogeneous not in ("remote_code", "pad"):
        raise UserError(f"heterogeneous: got {heterogeneous!r}; allowed: 'remote_code', 'pad'")
    with named("out_directory"):
        check_apart(out_directory, [elastic_directory], inside=True)
    config = hf.read_config(elastic_directory)
    if not isinstance(submodel_or_budget, Submodel):
        name = str(submodel_or_budget) if name is None else name
        submodel_or_budget = elastic_checkpoint.find_submodel(elastic_directory, submodel_or_budget)
    submodel = submodel_or_budget.resolve(config)
    pad = heterogeneous == "pad" and not submodel.is_homogeneous
    dtype = dtype or parent_dtype(config, str(elastic_directory))
    config = with_parent_dtype(config, None)
    no_cache = architectures.cache_values(config, submodel.kept_layers)
    generation = special_tokens.generation_values(config, elastic_directory) | no_cache
    changes = config_changes(config, submodel, pad) | special_tokens.token_ids(generation)
    reader = hf.TensorReader(elastic_directory)
    tensors = _sliced_tensors(reader, config, submodel, pad, dtype)
    tensors |= _norms(reader, config, submodel, tensors)
    if dtype is not None:
        changes["dtype"] = str(dtype).removeprefix("torch.")
    with whole_directory(out_directory) as partial:
        hf.write_config(partial, config, **changes)
        entries = {name: sliced.entry for name, sliced in tensors.items()}
        hf.write_tensors(partial, entries, tensors.items(), shard_bytes(elastic_directory))
        if "auto_map" in changes:
            file = architectures.of(config).MODELING_FILE
            (partial / file).write_text(resources.files("elastic_core.export").joinpath(file + ".txt").read_text())
        special_tokens.write_text_files(partial, elastic_directory, generation)
        copy_provenance(elastic_directory, partial)
        card = model_card.card_of_submodel(elastic_directory, config, submodel, name, "auto_map" not in changes)
        (partial / model_card.CARD).write_text(card, encoding="utf-8")
    return submodel


def _sliced_tensors(reader, config, submodel: Submodel, pad: bool, dtype) -> dict[str, SlicedTensor]:
    """The tensors of the kept layers, by their names on disk with new layer numbers.

    They are sliced when they are read. With `pad`, the MLPs of all layers get the width of the widest one.
    """
    layout, disk_name = architectures.parameter_layout(config), architectures.of(config).disk_name
    reader.check(architectures.shapes(config))
    reader.check_tied_head(next(iter(layout)))
    sizes = submodel.sizes(config)
    number = {layer: i for i, layer in enumerate(submodel.kept_layers)}
    final = sizes | (dict.fromkeys(keys_of(sizes, "ffn"), _widest(config, submodel)) if pad else {})
    tensors = {}
    for name, dims in layout.items():
        layer = layer_index(name)
        if layer is not None and layer not in number:
            continue
        shape = tuple(dim.count(final) for dim in dims)
        stored, kept = reader.stored(name), [kept_rows(dim, sizes) for dim in dims]
        held = architectures.stored_in(config, name, dtype or stored.entry.dtype)
        if layer is not None:
            name = name.replace(f"layers.{layer}.", f"layers.{number[layer]}.", 1)
        if is_stacked(name):
            experts = range(kept[0]) if isinstance(kept[0], int) else kept[0].tolist()
            found = matrices(stored)
            for i, expert in enumerate(experts):
                tensors[disk_name(matrix_name(name, i))] = SlicedTensor(found[expert], kept[1:], shape[1:], held)
        else:
            tensors[disk_name(name)] = SlicedTensor(stored, kept, shape, held)
    return tensors


def _norms(reader, config, submodel: Submodel, tensors: dict[str, SlicedTensor]) -> dict[str, GivenTensor]:
    """The norms of the submodel in place of those in `tensors`, if it has gains of its own (norm_gains.py)."""
    gains, norms = norm_gains.read(reader.directory, config), {}
    disk_name, number = architectures.of(config).disk_name, {layer: i for i, layer in enumerate(submodel.kept_layers)}
    own = norm_gains.gains_of(gains, config, submodel, lambda name: reader.read(name).float())
    for name, gain in own.items():
        layer = layer_index(name)
        if layer is None or layer in number:
            name = name if layer is None else name.replace(f"layers.{layer}.", f"layers.{number[layer]}.", 1)
            entry = tensors[disk_name(name)].entry
            norms[disk_name(name)] = GivenTensor(gain[: submodel.hidden_size].to(entry.dtype), entry)
    return norms


class GivenTensor(NamedTuple):
    """A tensor in memory, in place of a `SlicedTensor`."""

    tensor: Tensor
    entry: Entry

    def __getitem__(self, rows: slice) -> Tensor:
        return self.tensor[rows]


class SlicedTensor:
    """A slice of a stored tensor. `tensor[start:stop]` reads only these rows of the slice from the file.

    `kept` holds the kept rows of every dimension, as `kept_rows` gives them. If `shape` is larger than that, zeros fill
    the rest. `dtype` None keeps the stored type.
    """

    def __init__(self, stored: Stored, kept: list[int | Tensor], shape: tuple[int, ...], dtype: torch.dtype | None):
        self.stored, self.entry = stored, Entry(dtype or stored.entry.dtype, shape)
        self.runs = [_runs(rows) for rows in kept]

    def __getitem__(self, rows: slice) -> Tensor:
        # Copy with numpy, which stays on this thread. torch would start its own threads for every block.
        values = self.stored.read(list(_part_of_runs(self.runs[0], rows.start, rows.stop)))
        for axis, runs in enumerate(self.runs[1:], 1):
            pieces = [values[(slice(None),) * axis + (slice(*run),)] for run in runs]
            values = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis)
        tensor = torch.from_numpy(np.ascontiguousarray(values)).view(self.stored.entry.dtype).to(self.entry.dtype)
        missing = [size - kept for size, kept in zip(self._block_shape(rows), tensor.shape, strict=True)]
        return F.pad(tensor, [n for size in reversed(missing) for n in (0, size)]) if any(missing) else tensor

    def _block_shape(self, rows: slice) -> tuple[int, ...]:
        return rows.stop - rows.start, *self.entry.shape[1:]


def _runs(rows: int | Tensor) -> list[tuple[int, int]]:
    """Kept rows (a number of first rows, or row numbers) as runs [start, stop) of consecutive rows."""
    if not isinstance(rows, Tensor):
        return [(0, rows)]
    numbers = rows.numpy()
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return [(int(part[0]), int(part[-1]) + 1) for part in parts]


def _part_of_runs(runs: list[tuple[int, int]], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The runs of the kept rows number `start` to `stop` - 1, counted over all runs."""
    done = 0
    for first, end in runs:
        begin, last = first + max(start - done, 0), first + min(stop - done, end - first)
        if begin < last:
            yield begin, last
        done += end - first


def _kept_entries(config, submodel: Submodel, field: str) -> list[int]:
    """The sizes of a per-layer width `field` in the kept layers that have it, in order."""
    sizes = submodel.sizes(config)
    return [sizes[key] for key in keys_of(sizes, WIDTHS[field]) if layer_of(key) in submodel.kept_layers]


def _widest(config, submodel: Submodel) -> int:
    """The width of the widest MLP in the kept layers."""
    return max(_kept_entries(config, submodel, "intermediate_size"), default=config.intermediate_size)


def config_changes(config, submodel: Submodel, pad: bool = False) -> dict:
    """The entries of a submodel's configuration that differ from the parent's.

    `pad`: as if MLPs were padded to the widest one. Raises UserError for sizes that the configuration cannot express.
    """
    architecture, widths = architectures.of(config), {}
    for field in WIDTHS:
        value = getattr(submodel, field)
        if isinstance(value, tuple):
            value = _kept_entries(config, submodel, field)
            if pad and field == "intermediate_size":
                value = max(value)
            elif pad and architecture.MODELING_FILE is not None:
                raise UserError(f"{field}: differs between layers; only MLP widths can be padded, use 'remote_code'")
            elif architecture.MODELING_FILE is None:
                advice = ", or heterogeneous='pad' (zeros in the MLPs)" if field == "intermediate_size" else ""
                raise UserError(
                    f"{field}: got {value}, which a directory of model_type {config.model_type} cannot express; "
                    f"allowed: one size for all layers{advice}"
                )
        if value is not None:
            widths[field] = value
    problem = architecture.size_problem(config, submodel.hidden_size, submodel.num_attention_heads)
    if problem is not None:
        raise UserError(problem)
    changes = architecture.config_changes(config, submodel.kept_layers, widths)
    changes |= architectures.cache_values(config, submodel.kept_layers)
    if any(isinstance(widths.get(field), list) for field in PER_LAYER):
        module = architecture.MODELING_FILE.removesuffix(".py")
        names = zip(("AutoConfig", "AutoModelForCausalLM"), architecture.REMOTE_CLASSES, strict=True)
        changes["auto_map"] = {auto: f"{module}.{name}" for auto, name in names}
    return changes
