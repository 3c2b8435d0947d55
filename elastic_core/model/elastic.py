"""ElasticModel: the parent's weights, and a forward pass of any submodel nested in them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_core import hf
from elastic_core.layout import Layout, block_pattern, layer_index, parameter_layout
from elastic_core.model.cut import Cut, Observer
from elastic_core.model.layers import Block, Norm, add_parameters
from elastic_core.submodel import Submodel, full_submodel
from elastic_core.tensor_files import Entry


class Trunk(nn.Module):
    """Embeddings, layers and final norm: token ids to the hidden states that the head reads."""

    def __init__(self, config, layout: Layout):
        super().__init__()
        self.layout = {"embeddings.weight": layout["model.embeddings.weight"]}
        add_parameters(self, self.layout)
        layers = [{} for _ in block_pattern(config)]
        for name, dims in layout.items():
            if (layer := layer_index(name)) is not None:
                layers[layer][name.split(".", 3)[3]] = dims
        self.layers = nn.ModuleList(
            Block(config, character, i, layers[i]) for i, character in enumerate(block_pattern(config))
        )
        self.norm_f = Norm(config, {"weight": layout["model.norm_f.weight"]})

    def embed(self, input_ids: Tensor, cut: Cut) -> Tensor:
        x = F.embedding(input_ids, cut.weight(self, self.layout, "embeddings.weight"))
        if torch.is_autocast_enabled(x.device.type):  # the residual stream too, as where weights are gathered so
            x = x.to(torch.get_autocast_dtype(x.device.type))
        gate = cut.gate("hidden")
        return x if gate is None else x * gate.to(x.dtype)  # gates are float32; the residual stream keeps its own type

    def forward(self, input_ids: Tensor, cut: Cut) -> Tensor:
        x = self.embed(input_ids, cut)  # (B, L, hidden)
        for i in cut.kept_layers:
            x = self.layers[i](x, cut)
        return self.norm_f(x, cut)


class ElasticModel(nn.Module):
    """A `nemotron_h` model of which every submodel is a part. `.config` is transformers', `.full` the whole model."""

    def __init__(self, config):
        super().__init__()
        self.config = hf.check_config(config)
        self.layout = parameter_layout(config)
        self.full = full_submodel(config)
        self.model = Trunk(config, self.layout)
        self.lm_head = nn.Module()
        add_parameters(self.lm_head, {"weight": self.layout["lm_head.weight"]})

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, dtype: torch.dtype = torch.float32) -> ElasticModel:
        """Load a Hugging Face `nemotron_h` directory, tensor by tensor, as master weights of `dtype`.

        Raises ValueError for another family, unsupported layers, or tensors that do not match the configuration.
        """
        model, reader = cls.empty(directory)
        model = model.to_empty(device="cpu").to(dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(reader.read(name))
        return model

    @classmethod
    def empty(cls, directory: str | os.PathLike) -> tuple[ElasticModel, hf.TensorReader]:
        """The model of a directory without storage (on the meta device), and the checked reader of its tensors."""
        config = hf.read_config(directory)
        reader = hf.TensorReader(directory)
        with torch.device("meta"):
            model = cls(config)
        reader.check({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
        return model, reader

    def save_pretrained(self, directory: str | os.PathLike, tokenizer_from: str | os.PathLike | None = None) -> None:
        """Write a plain `nemotron_h` directory, whole or not at all, with the tokenizer of another directory."""
        parameters = dict(self.named_parameters())
        self.write(directory, ((name, parameters[name].detach().cpu()) for name in self.layout), tokenizer_from)

    def write(
        self,
        directory: str | os.PathLike,
        tensors: Iterable[tuple[str, Tensor]],
        tokenizer_from: str | os.PathLike | None = None,
    ) -> None:
        """`save_pretrained` with the parameters given one by one, all of the layout's and in its order."""
        parameters = dict(self.named_parameters())
        entries = {name: Entry(parameters[name].dtype, tuple(parameters[name].shape)) for name in self.layout}
        with hf.whole_directory(directory) as partial:
            hf.write_config(partial, self.config, dtype=str(self.lm_head.weight.dtype).removeprefix("torch."))
            hf.write_tensors(partial, entries, tensors)
            if tokenizer_from is not None:
                hf.copy_tokenizer(tokenizer_from, partial)

    def cut(
        self,
        submodel: Submodel | None = None,
        gates: Mapping[str, Tensor] | None = None,
        observe: Observer | None = None,
    ) -> Cut:
        """What `hidden_states` and `head` compute with; make it once for several calls."""
        device = self.lm_head.weight.device
        return Cut(self.config, self.layout, device, submodel or self.full, gates, observe)

    def hidden_states(self, input_ids: Tensor, cut: Cut) -> Tensor:
        """Final normed hidden states (B, L, kept hidden) of token ids (B, L)."""
        return self.model(input_ids, cut)

    def head(self, cut: Cut) -> Tensor:
        """The head's weight (vocab, kept hidden): logits = hidden_states @ head.T"""
        return cut.weight(self, self.layout, "lm_head.weight")

    def forward(
        self, input_ids: Tensor, submodel: Submodel | None = None, gates: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Logits (B, L, vocab) of token ids (B, L) int64; `submodel` omitted is the full model."""
        cut = self.cut(submodel, gates)
        return F.linear(self.hidden_states(input_ids, cut), self.head(cut))
