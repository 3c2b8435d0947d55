"""Extraction: an elastic checkpoint and a submodel in, an ordinary Hugging Face directory out. No training."""

import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_core import elastic_checkpoint, hf
from elastic_core.layout import Layout, kept_rows, layer_index, layers_of, narrow, parameter_layout
from elastic_core.submodel import PER_LAYER, WIDTHS, Submodel

MODELING_FILE = "modeling_elastic_nemotron_h.py"


def extract(
    elastic_directory: str | os.PathLike,
    submodel_or_budget: Submodel | str | float,
    out_directory: str | os.PathLike,
    heterogeneous: str = "remote_code",
    dtype: torch.dtype | None = None,
) -> Submodel:
    """Cut a submodel out of a checkpoint directory into `out_directory`, whole or not at all, and return it resolved.

    `submodel_or_budget`: a Submodel; or, where the directory has an ``elastic.json``, a budget's name or target (see
    `elastic_checkpoint.find_submodel`). A homogeneous submodel becomes a stock `nemotron_h` directory. Widths that
    differ between layers need ``heterogeneous``: ``remote_code`` adds a modeling file (load it with
    ``trust_remote_code=True``), ``pad`` fills MLPs with zeros to the widest, which is exact and loads anywhere.
    `dtype` None keeps the stored element type. Tensors are read, cut and written one at a time.
    """
    if heterogeneous not in ("remote_code", "pad"):
        raise ValueError(f"heterogeneous: got {heterogeneous!r}; allowed: 'remote_code', 'pad'")
    if Path(elastic_directory).resolve().is_relative_to(Path(out_directory).resolve()):  # which would be replaced
        raise ValueError(
            f"out_directory: got {out_directory}, which is the checkpoint itself or holds it; name another directory"
        )
    config = hf.read_config(elastic_directory)
    if not isinstance(submodel_or_budget, Submodel):
        submodel_or_budget = elastic_checkpoint.find_submodel(elastic_directory, submodel_or_budget)
    submodel = submodel_or_budget.resolve(config)
    pad = heterogeneous == "pad" and not submodel.is_homogeneous
    changes = config_changes(config, submodel, pad)
    reader = hf.TensorReader(elastic_directory)
    if dtype is not None:
        changes["dtype"] = str(dtype).removeprefix("torch.")
    with hf.whole_directory(out_directory) as partial:
        hf.write_config(partial, config, **changes)
        hf.write_tensors(partial, _cut_tensors(reader, config, submodel, pad, dtype))
        if "auto_map" in changes:
            source = resources.files("elastic_core").joinpath(MODELING_FILE + ".txt").read_text()
            (partial / MODELING_FILE).write_text(source)
        hf.copy_tokenizer(elastic_directory, partial)
    return submodel


def _cut_tensors(reader, config, submodel: Submodel, pad: bool, dtype) -> Iterator[tuple[str, Tensor]]:
    """The kept layers' tensors, cut to size and renumbered."""
    layout: Layout = parameter_layout(config)
    sizes = submodel.sizes(config)
    number = {layer: i for i, layer in enumerate(submodel.kept_layers)}
    padded = sizes | {f"ffn.{i}": _widest(config, submodel, "intermediate_size") for i in layers_of(config, "-")}
    for name, dims in layout.items():
        layer = layer_index(name)
        if layer is not None and layer not in number:
            continue
        tensor = narrow(reader.read(name), dims, sizes)
        if pad and any(leaf.key.startswith("ffn.") for dim in dims for leaf in dim.leaves()):
            tensor = F.pad(tensor, [n for dim in reversed(dims) for n in (0, _missing(dim, sizes, padded))])
        if layer is not None:
            name = name.replace(f"layers.{layer}.", f"layers.{number[layer]}.", 1)
        yield name, tensor.to(dtype or tensor.dtype)


def _missing(dim, sizes, padded) -> int:
    """How many zero rows bring a dimension of the MLP (whose rows are a prefix) from `sizes` to `padded`."""
    return kept_rows(dim, padded) - kept_rows(dim, sizes)


def _kept_entries(config, submodel: Submodel, field: str) -> list[int]:
    """A per-layer width's entries for the kept layers of its type, in order."""
    value, character = getattr(submodel, field), WIDTHS[field][0]
    kept = [layer in submodel.kept_layers for layer in layers_of(config, character)]
    entries = value if isinstance(value, tuple) else (value,) * len(kept)
    return [entry for entry, keep in zip(entries, kept, strict=True) if keep]


def _widest(config, submodel: Submodel, field: str) -> int:
    return max(_kept_entries(config, submodel, field), default=getattr(config, field))


def config_changes(config, submodel: Submodel, pad: bool = False) -> dict:
    """What a submodel's configuration has that differs from the parent's."""
    changes = {
        "hidden_size": submodel.hidden_size,
        "mamba_head_dim": submodel.mamba_head_dim,
        "head_dim": config.head_dim,
        "layers_block_type": [config.layers_block_type[i] for i in submodel.kept_layers],
    }
    for field in PER_LAYER:
        value = getattr(submodel, field)
        if not isinstance(value, tuple):
            changes[field] = value
        elif not pad:
            changes[field] = _kept_entries(config, submodel, field)
        elif field == "intermediate_size":
            changes[field] = _widest(config, submodel, field)
        else:
            raise ValueError(f"{field}: differs between layers; only MLP widths can be padded, use 'remote_code'")
    if any(isinstance(changes[field], list) for field in PER_LAYER):
        module = MODELING_FILE.removesuffix(".py")
        changes |= {
            "auto_map": {
                "AutoConfig": f"{module}.ElasticNemotronHConfig",
                "AutoModelForCausalLM": f"{module}.ElasticNemotronHForCausalLM",
            },
        }
    return changes
