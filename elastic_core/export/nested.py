"""Many models in one: every budget of an elastic checkpoint, served from one set of weights in memory.

The budgets are nested, so the rows of every weight can be stored in the order in which the budgets come to need them,
smallest first. Each budget's weight is then a view of the first rows and columns, whatever the structure inside
(groups, heads, channels), and a budget is a transformers model made of views. Where a layer needs its activations in
another order than the weight's rows stand in, they are put in order beside the matrix product: an index of a vector
per token, instead of a copy of a matrix per budget.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import tempfile
from collections.abc import Sequence
from importlib import resources
from importlib.machinery import SourceFileLoader
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from elastic_core.cost.metrics import num_parameters
from elastic_core.errors import UserError
from elastic_core.export import elastic_checkpoint
from elastic_core.export.extract import config_changes
from elastic_core.model import architectures, hf
from elastic_core.model.dims import Dim, kept_rows, layer_index
from elastic_core.model.submodel import Submodel, full_submodel

BudgetLike = str | float | Submodel


class NestedModel:
    """All budgets of an elastic checkpoint. `.config` is the parent's, `.budgets` the trained submodels by name.

    A budget is a trained one's name, a target in between ("9B", 0.75; see `elastic_checkpoint.find_submodel`) or a
    Submodel that is nested with the others.
    """

    def __init__(self, directory: str | os.PathLike, dtype: torch.dtype | None, device: torch.device | str):
        self.directory, self.config = directory, hf.read_config(directory)
        self.layout = architectures.parameter_layout(self.config)
        content = elastic_checkpoint.read(directory)
        self.budgets = {
            name: Submodel(**entry["submodel"]).resolve(self.config) for name, entry in content["budgets"].items()
        }
        path = [Submodel(**values).resolve(self.config) for values in content["path"]]
        self.chain = nested_chain(self.config, [*self.budgets.values(), *path, full_submodel(self.config)])
        self._orders: dict[Dim, Tensor | None] = {}
        self._models: dict[Submodel, PreTrainedModel] = {}
        self.weights: dict[str, Tensor] = {}  # by name, rows and columns in the order of `_order`
        reader = hf.TensorReader(directory)
        for name, dims in self.layout.items():
            tensor = reader.read(name)
            for axis, dim in enumerate(dims):
                if (order := self._order(dim, layer_index(name))) is not None:
                    tensor = tensor.index_select(axis, order)
            held = tensor.dtype if dtype is None else architectures.held_in(self.config, name, dtype)
            tensor = tensor.to(device=device, dtype=held)
            self.weights[name] = tensor.clone(memory_format=torch.contiguous_format)  # and not a map of the file

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> NestedModel:
        """Load an elastic checkpoint (a directory with ``elastic.json``); `dtype` None keeps the stored type.

        Raises ValueError for a directory without budgets, or whose budgets are not nested.
        """
        return cls(directory, dtype, device)

    def at(self, budget: BudgetLike) -> PreTrainedModel:
        """The transformers model of one budget: for all that transformers can do, on the shared weights."""
        submodel = self.submodel(budget)
        if submodel not in self._models:
            self._models[submodel] = self._build(submodel)
        return self._models[submodel]

    def generate(self, input_ids: Tensor, budget: BudgetLike, **options) -> Tensor:
        """transformers' `generate` at one budget: input_ids (B, L) int64 → (B, L + new tokens)."""
        return self.at(budget).generate(input_ids, **options)

    def submodel(self, budget: BudgetLike) -> Submodel:
        """The submodel that serves a budget. Raises ValueError where none does, or where it is not nested."""
        if isinstance(budget, Submodel):
            submodel = budget.resolve(self.config)
        elif budget in self.budgets:
            return self.budgets[budget]
        else:
            submodel = elastic_checkpoint.find_submodel(self.directory, budget).resolve(self.config)
        if submodel not in self.chain:
            nested_chain(self.config, [*self.chain, submodel])
        return submodel

    def conversation(self) -> Conversation:
        """A text that several budgets read and continue in turn."""
        return Conversation(self)

    def num_bytes(self) -> int:
        """What the weights take, once for all budgets, without what `at` copies."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.weights.values())

    def _order(self, dim: Dim, layer: int | None) -> Tensor | None:
        """The rows of `dim` as they are stored: those of the smallest budget first; None where they stand so already.

        Budgets that drop the layer have no say.
        """
        if dim not in self._orders:
            members = torch.zeros(dim.size, dtype=torch.int64)
            for submodel in self.chain:
                if layer is None or layer in submodel.kept_layers:
                    rows = kept_rows(dim, submodel.sizes(self.config))
                    members[slice(rows) if isinstance(rows, int) else rows] += 1
            order = members.argsort(descending=True, stable=True)
            self._orders[dim] = None if torch.equal(order, torch.arange(dim.size)) else order
        return self._orders[dim]

    def _places(self, dim: Dim, layer: int | None, sizes: dict[str, int]) -> tuple[int, Tensor | None]:
        """How many stored rows a budget has, and where among them its rows are; None where they stand in order.

        Raises ValueError where the budget's rows are not the first stored ones.
        """
        rows = kept_rows(dim, sizes)
        number = rows if isinstance(rows, int) else len(rows)
        order = self._order(dim, layer)
        if order is None:
            order = torch.arange(dim.size)
        stored, places = order[:number].sort()
        if not torch.equal(stored, torch.arange(number) if isinstance(rows, int) else rows):
            raise UserError("this submodel is nested with the checkpoint's budgets, but needs rows in between theirs")
        return number, None if torch.equal(places, torch.arange(number)) else places

    def _build(self, submodel: Submodel) -> PreTrainedModel:
        """A transformers model whose parameters are views of the weights.

        Short ones that stand in another order are copied, and experts, where they are cut in groups.
        """
        model = empty_model(self.config, submodel)
        sizes, number = submodel.sizes(self.config), {layer: i for i, layer in enumerate(submodel.kept_layers)}
        for name, dims in self.layout.items():
            layer = layer_index(name)
            if layer is not None and layer not in number:
                continue
            places = [self._places(dim, layer, sizes) for dim in dims]
            weight = self.weights[name]
            for axis, (rows, _) in enumerate(places):
                weight = weight.narrow(axis, 0, rows)
            if layer is not None:
                name = name.replace(f"layers.{layer}.", f"layers.{number[layer]}.", 1)
            set_parameter(model, name, weight, [place for _, place in places])
        architectures.of(self.config).finish(model, weight.device)
        return model.eval()


class Projection(nn.Linear):
    """A linear layer whose weight's rows and columns stand in another order than its output and input do."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.outputs: Tensor | None = None  # where in the weight's rows each output is
        self.inputs: Tensor | None = None  # which input each of the weight's columns takes

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is not None:
            x = x.index_select(-1, self.inputs)
        y = F.linear(x, self.weight)
        if self.outputs is not None:
            y = y.index_select(-1, self.outputs)
        return y if self.bias is None else y + self.bias


def set_parameter(model: nn.Module, name: str, weight: Tensor, places: Sequence[Tensor | None] = ()) -> None:
    """Give a module its weight: a view, with an order beside it for a matrix; short parameters are put in order.

    `places`: where the rows of each dimension stand, None where they stand in order.
    """
    owner_name, leaf = name.rsplit(".", 1)
    owner = model.get_submodule(owner_name)
    if any(place is not None for place in places):
        places = [None if place is None else place.to(weight.device) for place in places]
        if isinstance(owner, nn.Linear) and leaf == "weight":
            owner = _as_projection(model, owner_name, owner)
            owner.outputs = places[0]
            owner.inputs = None if places[1] is None else places[1].argsort()
        else:
            for axis, place in enumerate(places):
                weight = weight if place is None else weight.index_select(axis, place)
    setattr(owner, leaf, weight if leaf in owner._buffers else nn.Parameter(weight, requires_grad=False))


def _as_projection(model: nn.Module, name: str, linear: nn.Linear) -> Projection:
    """Put a Projection in a linear layer's place, with the bias that this may have been given already."""
    projection = Projection(linear)
    projection.bias = linear.bias
    model.set_submodule(name, projection)
    return projection


def empty_model(config, submodel: Submodel) -> PreTrainedModel:
    """The transformers model of a submodel, without storage; of the modeling file's class where widths differ."""
    family = architectures.of(config)
    _, model_class = family.MODELS[config.model_type]
    if not submodel.is_homogeneous:
        model_class = getattr(_modeling_file(family.MODELING_FILE), family.REMOTE_CLASSES[1])
    with torch.device("meta"):
        return model_class(_submodel_config(config, submodel))


def _submodel_config(config, submodel: Submodel) -> PreTrainedConfig:
    """A submodel's configuration, read from a file as an extracted model's is."""
    family = architectures.of(config)
    with tempfile.TemporaryDirectory() as directory:
        hf.write_config(Path(directory), config, **config_changes(config, submodel))
        config_class, _ = family.MODELS[config.model_type]
        if not submodel.is_homogeneous:
            config_class = getattr(_modeling_file(family.MODELING_FILE), family.REMOTE_CLASSES[0])
        return config_class.from_pretrained(directory)


@functools.cache
def _modeling_file(file: str):
    """The modeling file that travels with heterogeneous exports, imported from this package."""
    name = file.removesuffix(".py")
    path = resources.files("elastic_core.export").joinpath(file + ".txt")
    loader = SourceFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


def nested_chain(config, submodels: list[Submodel]) -> list[Submodel]:
    """The different ones of `submodels`, smallest first; ValueError unless each lies within the next."""
    chain = sorted(set(submodels), key=lambda submodel: num_parameters(config, submodel))
    for smaller, larger in itertools.pairwise(chain):
        if not smaller.is_within(larger, config):
            raise UserError(f"budgets: {smaller} is not nested in {larger}; extract it to serve it by itself")
    return chain


class Conversation:
    """A text that several budgets read and continue in turn; `.input_ids` (B, L) int64 is what stands so far.

    What a Mamba or attention layer remembers of the text depends on the budget that read it, so every budget has a
    cache of its own, and reads what others have added when its turn comes: its tokens are those of the extracted model
    given the same text. With ``hand_over``, a budget that lies within another one starts from the part of that one's
    cache that it has room for, and reads only the rest: no second reading, but a memory that it would not have formed
    itself. The reverse is not possible: the cache of a smaller budget has no state for the heads, channels and layers
    that only the larger one has.
    """

    def __init__(self, model: NestedModel):
        self.model, self.input_ids = model, None
        self.caches: dict[Submodel, Cache] = {}  # what each budget remembers of the text that it has read

    def say(self, input_ids: Tensor) -> None:
        """Add to the text: (B, L) int64."""
        self.input_ids = input_ids if self.input_ids is None else torch.cat([self.input_ids, input_ids], dim=1)

    def generate(self, budget: BudgetLike, hand_over: bool = False, **options) -> Tensor:
        """Continue the text at one budget, with transformers' options; the new tokens (B, N), which are part of it."""
        if self.input_ids is None:
            raise UserError("conversation: nothing has been said yet; begin with say(input_ids)")
        submodel, length = self.model.submodel(budget), self.input_ids.shape[1]
        model = self.model.at(submodel)
        if hand_over:
            self._take_over(submodel)
        cache = self.caches.setdefault(submodel, DynamicCache(config=model.config))
        everything = torch.ones_like(self.input_ids)  # nothing of a text is padding, whichever tokens it has
        self.input_ids = model.generate(
            self.input_ids, attention_mask=everything, past_key_values=cache, use_cache=True, **options
        )
        return self.input_ids[:, length:]

    def _take_over(self, submodel: Submodel) -> None:
        """Start from the part of a larger budget's cache, where one has read more of the text than this one has."""
        own = self.caches.get(submodel)
        best, read = None, 0 if own is None else own.get_seq_length()
        for other, cache in self.caches.items():
            if other != submodel and submodel.is_within(other, self.model.config) and cache.get_seq_length() > read:
                best, read = other, cache.get_seq_length()
        if best is not None:
            self.caches[submodel] = part_of_cache(self.model.config, self.caches[best], best, submodel)


def part_of_cache(config, cache: Cache, larger: Submodel, smaller: Submodel) -> Cache:
    """A cache for `smaller` with what the cache of `larger`, within which it lies, holds of its heads and layers."""
    layout, part = architectures.parameter_layout(config), DynamicCache(config=_submodel_config(config, smaller))
    sizes, larger_sizes = smaller.sizes(config), larger.sizes(config)

    def within(layer: int, name: str) -> Tensor:
        """Where the smaller one's rows of a layer's parameter stand among the larger one's."""
        dim = layout[f"model.layers.{layer}.{name}"][0]
        rows, larger_rows = kept_rows(dim, sizes), kept_rows(dim, larger_sizes)
        rows, larger_rows = (torch.arange(r) if isinstance(r, int) else r for r in (rows, larger_rows))
        return torch.searchsorted(larger_rows.contiguous(), rows.contiguous())

    for number, layer in enumerate(smaller.kept_layers):
        state = cache.layers[larger.kept_layers.index(layer)]
        architectures.of(config).copy_state(config, layer, state, functools.partial(within, layer), part, number)
    return part
