"""A transformers model of a submodel whose parameters are views of weights that stand elsewhere in memory."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Sequence
from importlib import resources
from importlib.machinery import SourceFileLoader
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from elastic_core.export.extract import config_changes
from elastic_core.model import architectures, hf
from elastic_core.model.submodel import Submodel


class Projection(nn.Linear):
    """A linear layer for a weight with rows and columns in another order than the layer's outputs and inputs."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.outputs: Tensor | None = None  # for each output, its row of the weight; None: same order
        self.inputs: Tensor | None = None  # for each column of the weight, its input; None: same order

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is not None:
            x = x.index_select(-1, self.inputs)
        y = F.linear(x, self.weight)
        if self.outputs is not None:
            y = y.index_select(-1, self.outputs)
        return y if self.bias is None else y + self.bias


def set_parameter(model: nn.Module, name: str, weight: Tensor, positions: Sequence[Tensor | None] = ()) -> None:
    """Set the parameter `name` of `model` to `weight`.

    `positions`: for each dimension, the position in `weight` of each of the layer's rows, or None for the same order.
    The weight of a linear layer stays a view, and the layer becomes a `Projection`. Other parameters are copied.
    """
    owner_name, leaf = name.rsplit(".", 1)
    owner = model.get_submodule(owner_name)
    if any(position is not None for position in positions):
        positions = [None if position is None else position.to(weight.device) for position in positions]
        if isinstance(owner, nn.Linear) and leaf == "weight":
            owner = _as_projection(model, owner_name, owner)
            owner.outputs = positions[0]
            owner.inputs = None if positions[1] is None else positions[1].argsort()
        else:
            for axis, position in enumerate(positions):
                weight = weight if position is None else weight.index_select(axis, position)
    setattr(owner, leaf, weight if leaf in owner._buffers else nn.Parameter(weight, requires_grad=False))


def _as_projection(model: nn.Module, name: str, linear: nn.Linear) -> Projection:
    """Replace a linear layer by a Projection. It takes over the bias, which may already be set."""
    projection = Projection(linear)
    projection.bias = linear.bias
    model.set_submodule(name, projection)
    return projection


def empty_model(config, submodel: Submodel) -> PreTrainedModel:
    """The transformers model of a submodel, on the meta device.

    For a heterogeneous submodel, its class is that of the modeling file.
    """
    architecture = architectures.of(config)
    model_class = architectures.model_class(config)
    if not submodel.is_homogeneous:
        model_class = getattr(_modeling_file(architecture.MODELING_FILE), architecture.REMOTE_CLASSES[1])
    with torch.device("meta"):
        return model_class(submodel_config(config, submodel))


def submodel_config(config, submodel: Submodel) -> PreTrainedConfig:
    """The configuration of a submodel. It is written and read again, so that it is that of an extracted model."""
    architecture = architectures.of(config)
    with tempfile.TemporaryDirectory() as directory:
        hf.write_config(Path(directory), config, **config_changes(config, submodel))
        config_class = architectures.config_class(config.model_type, "config")
        if not submodel.is_homogeneous:
            config_class = getattr(_modeling_file(architecture.MODELING_FILE), architecture.REMOTE_CLASSES[0])
        return config_class.from_pretrained(directory)


@functools.cache
def _modeling_file(file: str):
    """The modeling file that `extract` adds to heterogeneous models, as a module."""
    name = file.removesuffix(".py")
    path = resources.files("elastic_core.export").joinpath(file + ".txt")
    loader = SourceFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module
