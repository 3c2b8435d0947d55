"""ElasticModel: the parent's weights, and a forward pass of any submodel that is nested in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_core.data import special_tokens
from elastic_core.io.atomic import whole_directory
from elastic_core.io.tensor_files import Entry
from elastic_core.model import architectures, hf, norm_gains
from elastic_core.model.dims import Layout
from elastic_core.model.documents import Documents, documents_of
from elastic_core.model.files.weights import shard_bytes
from elastic_core.model.hf import HEAD
from elastic_core.model.layers import Norm, add_parameters, part_of
from elastic_core.model.slicing import Observer, Slice
from elastic_core.model.submodel import Submodel, full_submodel

AfterLayer = Callable[[int, Tensor], None]  # called with a layer and the residual stream (B, L, kept hidden) after it


class Trunk(nn.Module):
    """Embeddings, layers and final norm, under the names of the architecture: token ids → input of the head."""

    def __init__(self, config, layout: Layout):
        super().__init__()
        architecture, layout = architectures.of(config), part_of(layout, "model")
        self.embeddings_name, self.final_norm_name = f"{architecture.EMBEDDINGS}.weight", architecture.FINAL_NORM
        self.layout = {self.embeddings_name: layout[self.embeddings_name]}
        add_parameters(self, self.layout)
        self.layers = nn.ModuleList(
            architecture.Block(config, i, part_of(layout, f"layers.{i}"))
            for i in range(architectures.num_layers(config))
        )
        final_norm = Norm(
            f"model.{self.final_norm_name}.weight",
            architecture.norm_eps(config),
            part_of(layout, self.final_norm_name),
        )
        self.add_module(self.final_norm_name, final_norm)

    @property
    def final_norm(self) -> Norm:
        return self.get_submodule(self.final_norm_name)

    def embedding_weight(self, sliced: Slice) -> Tensor:
        """The narrowed weight of the embeddings (vocab, kept hidden)."""
        return sliced.weight(self, self.layout, self.embeddings_name)

    def embed(self, input_ids: Tensor, sliced: Slice) -> Tensor:
        """Token ids (B, L) → residual stream (B, L, kept hidden)."""
        x = F.embedding(input_ids, self.embedding_weight(sliced))
        # F.embedding ignores autocast. FSDP gathers weights in the low precision, so without this cast the residual
        # stream would have another type in one process than in several.
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        gate = sliced.gate("hidden")
        return x if gate is None else x * gate.to(x.dtype)  # gates are float32; keep the type of x

    def forward(
        self,
        input_ids: Tensor,
        sliced: Slice,
        documents: Documents | None = None,
        after_layer: AfterLayer | None = None,
    ) -> Tensor:
        """Token ids (B, L) → final normed hidden states (B, L, kept hidden). See `ElasticModel.hidden_states`."""
        x = self.embed(input_ids, sliced)  # (B, L, hidden)
        for i in sliced.kept_layers:
            x = self.layers[i](x, sliced, documents)
            if after_layer is not None:
                after_layer(i, x)
        return self.final_norm(x, sliced)


class ElasticModel(nn.Module):
    """The parent's weights in full size; a forward pass computes with all of them or with one submodel.

    `.config` is the configuration of transformers, `.full` the submodel that is the whole model, and `.norm_gains` the
    gains of the norms in submodels (None: submodels have those of the whole model). With tied embeddings there is no
    `lm_head`, because the head uses the weight of the embeddings.
    Raises UserError for a `config` that this library does not support.
    """

    def __init__(self, config):
        super().__init__()
        self.config = hf.check_config(config)
        self.layout = architectures.parameter_layout(config)
        self.full = full_submodel(config)
        self.norm_gains: norm_gains.NormRatios | norm_gains.BudgetGains | None = None
        self.model = Trunk(config, self.layout)
        if HEAD in self.layout:
            self.lm_head = nn.Module()
            add_parameters(self.lm_head, part_of(self.layout, "lm_head"))

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike, dtype: torch.dtype = torch.float32, config=None
    ) -> ElasticModel:
        """Load a Hugging Face directory, tensor by tensor, as weights of `dtype`. For `config` see `empty`.

        Raises UserError for an unknown architecture, unsupported layers, or tensors that do not match config.json.
        """
        model, reader = cls.empty(directory, config)
        model = model.to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data.to(architectures.held_in(model.config, name, dtype))
                parameter.copy_(reader.read(name))
        return model

    @classmethod
    def empty(cls, directory: str | os.PathLike, config=None) -> tuple[ElasticModel, hf.TensorReader]:
        """The model of a directory on the meta device (without memory), and a reader of its tensors.

        `config`: a configuration to use instead of the directory's, with the same sizes. If it has untied embeddings
        and the directory's are tied, the head is a copy of the embeddings.
        The names and shapes of the tensors are checked. Raises UserError as `from_pretrained` does.
        """
        config = hf.read_config(directory) if config is None else config
        reader, shapes = hf.TensorReader(directory), architectures.shapes(config)
        if HEAD in shapes:
            reader.untie(next(iter(shapes)))
        reader.check(shapes)  # before the model is built: only sizes that the files have are sure to be possible
        reader.check_tied_head(next(iter(shapes)))
        with torch.device("meta"):
            model = cls(config)
        model.norm_gains = norm_gains.read(directory, config)
        return model, reader

    def save_pretrained(self, directory: str | os.PathLike, tokenizer_from: str | os.PathLike | None = None) -> None:
        """Write a Hugging Face directory of the whole model, complete or not at all.

        `tokenizer_from` is a directory with the tokenizer and chat template to copy. The special tokens are the same in
        all files (see special_tokens.py). Files of weights are at most as large as those there.
        Raises UserError if `directory` exists and is not a model directory.
        """
        parameters = dict(self.named_parameters())
        self.write(directory, ((name, parameters[name].detach().cpu()) for name in self.layout), tokenizer_from)

    def write(
        self,
        directory: str | os.PathLike,
        tensors: Iterable[tuple[str, Tensor]],
        tokenizer_from: str | os.PathLike | None = None,
    ) -> None:
        """As `save_pretrained`, but with given parameters: (name, tensor) for all of the layout, in its order."""
        parameters, disk_name = dict(self.named_parameters()), architectures.of(self.config).disk_name
        entries = {}
        for name in self.layout:
            entry = Entry(parameters[name].dtype, tuple(parameters[name].shape))
            entries |= hf.disk_entries(name, entry, disk_name)
        written = (found for name, rows in tensors for found in hf.disk_tensors(name, rows, disk_name))
        dtype, most = self._any_matrix().dtype, shard_bytes(tokenizer_from)
        self.write_with(
            directory, lambda partial: hf.write_tensors(partial, entries, written, most), dtype, tokenizer_from
        )

    def write_with(
        self,
        directory: str | os.PathLike,
        write_weights: Callable[[Path], None],
        dtype: torch.dtype,
        tokenizer_from: str | os.PathLike | None = None,
    ) -> None:
        """As `save_pretrained`, where `write_weights` fills the new directory with safetensors files of `dtype`."""
        no_cache = architectures.cache_values(self.config)
        generation = special_tokens.generation_values(self.config, tokenizer_from) | no_cache
        changes = special_tokens.token_ids(generation) | no_cache | {"dtype": str(dtype).removeprefix("torch.")}
        with whole_directory(directory) as partial:
            hf.write_config(partial, self.config, **changes)
            write_weights(partial)
            special_tokens.write_text_files(partial, tokenizer_from, generation)
            if self.norm_gains is not None:
                self.norm_gains.write(partial)

    def slice(
        self,
        submodel: Submodel | None = None,
        gates: Mapping[str, Tensor] | None = None,
        observe: Observer | None = None,
    ) -> Slice:
        """The slice for `hidden_states` and `head`. Create it once for several calls.

        `submodel` None is the whole model; for `gates` and `observe` see `Slice`. Raises UserError for invalid sizes.
        """
        submodel = (submodel or self.full).resolve(self.config)
        sizes, gains = submodel.sizes(self.config), self.gains_of(submodel)
        return Slice(self.layout, self._device(), sizes, submodel.kept_layers, gates, observe, gains)

    def gains_of(self, submodel: Submodel) -> norm_gains.Gains:
        """The gains of a resolved submodel's norms, where they are not those of the whole model."""
        if self.norm_gains is None or submodel == self.full:
            return {}
        device = self._device()
        gains = self.norm_gains.of(self.config, submodel, self.get_parameter)
        return {name: gain.to(device) for name, gain in gains.items()}

    def _any_matrix(self) -> Tensor:
        return self.get_parameter(next(iter(self.layout)))

    def _device(self) -> torch.device:
        """Where the model computes. Shards of matrices may be in CPU memory; norms are not sharded."""
        return next(self.model.final_norm.parameters()).device

    def hidden_states(
        self,
        input_ids: Tensor,
        sliced: Slice,
        documents: Documents | None = None,
        after_layer: AfterLayer | None = None,
    ) -> Tensor:
        """Token ids (B, L) int64 → final normed hidden states (B, L, kept hidden).

        - `documents`: the documents of packed rows, which do not see each other (None: each row is one document).
        - `after_layer(layer, x)` is called after every kept layer, with the residual stream x (B, L, kept hidden).
        """
        return self.model(input_ids, sliced, documents, after_layer)

    def head(self, sliced: Slice) -> Tensor:
        """The narrowed weight of the head (vocab, kept hidden): logits = hidden_states @ head.T"""
        return sliced.weight(self, self.layout, HEAD) if HEAD in self.layout else self.model.embedding_weight(sliced)

    def forward(
        self,
        input_ids: Tensor,
        submodel: Submodel | None = None,
        gates: Mapping[str, Tensor] | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Token ids (B, L) int64 → logits (B, L, vocab). `submodel` None is the whole model.

        `document_ids` (B, L) int64, not decreasing in a row: documents do not see each other, so the logits of each are
        those that it has alone. None: every row is one document. Raises UserError for other ids.
        """
        sliced, documents = self.slice(submodel, gates), documents_of(document_ids, input_ids)
        return F.linear(self.hidden_states(input_ids, sliced, documents), self.head(sliced))
