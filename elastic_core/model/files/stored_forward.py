"""A forward pass of weights that stay in files: memory holds one layer at a time, whatever the model's size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_core.model import hf
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.model.slicing import Slice


@torch.no_grad()
def stored_logits(model: ElasticModel, reader: hf.TensorReader, input_ids: Tensor) -> Tensor:
    """Token ids (B, L) int64 → logits (B, L, vocab) of the whole model in float32.

    `model` is on the meta device and stays there; `reader` has its weights (see `ElasticModel.empty`).
    """
    sliced = Slice(model.layout, input_ids.device, model.full.sizes(model.config), model.full.kept_layers)
    trunk = model.model
    with _held(trunk, "model", reader, [trunk.embeddings_name]):
        x = trunk.embed(input_ids, sliced)  # (B, L, hidden)
    for i in sliced.kept_layers:
        with _held(trunk.layers[i], f"model.layers.{i}", reader):
            x = trunk.layers[i](x, sliced)
    with _held(trunk.final_norm, f"model.{trunk.final_norm_name}", reader):
        x = trunk.final_norm(x, sliced)
    head = ("lm_head", ["weight"]) if hf.HEAD in model.layout else ("model", [trunk.embeddings_name])
    with _held(model.get_submodule(head[0]), head[0], reader, head[1]):
        return F.linear(x, model.head(sliced))


@contextmanager
def _held(module: nn.Module, name: str, reader: hf.TensorReader, keys: Iterable[str] | None = None) -> Iterator[None]:
    """Inside of the block, parameters of a module on the meta device have their values, in float32.

    `name`: of the module in the model. `keys`: the parameters, by their names in the module (None: all of them).
    """
    parameters = dict(module.named_parameters())
    empty = {key: parameters[key].data for key in (parameters if keys is None else keys)}
    try:
        values = {key: reader.read(f"{name}.{key}").float() for key in empty}
        module.load_state_dict(values, strict=False, assign=True)
        yield
    finally:
        module.load_state_dict(empty, strict=False, assign=True)
