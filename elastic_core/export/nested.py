"""Serve all budgets of an elastic checkpoint from one copy of the weights in memory.

The rows of every weight are stored in this order: first the rows that the smallest size of a dimension uses, then those
that the next larger size adds, and so on; columns likewise. The weight of each budget is then a view of the first rows
and columns, and the model of a budget is a transformers model with views as parameters. If two axes make up a dimension
(heads and channels), this needs pairs of sizes that are nested, as the trained budgets and those in between have them.

The stored order can differ from the order in which a layer needs its activations, because rows come in groups, heads
and channels. Then the activations are permuted before or after the matrix product. This costs one index operation on a
vector per token, instead of a copy of the matrix per budget.
"""

from __future__ import annotations

import functools
import itertools
import os

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel

from elastic_core.cost.metrics import num_parameters
from elastic_core.data.special_tokens import generation_values
from elastic_core.errors import UserError, named
from elastic_core.export import elastic_checkpoint
from elastic_core.export.padding import check_padding
from elastic_core.export.view_model import empty_model, set_parameter, submodel_config
from elastic_core.model import architectures, hf, norm_gains
from elastic_core.model.dims import Dim, Units, elastic_keys, kept_rows, layer_index
from elastic_core.model.submodel import Submodel, full_submodel

BudgetLike = str | float | Submodel  # a trained budget's name, a target, or a Submodel; see NestedModel


class NestedModel:
    """All budgets of an elastic checkpoint, on one copy of the weights.

    `.config` is the configuration of the parent; `.budgets` maps the names of trained budgets to their submodels.

    Methods take a budget in one of three forms: the name of a trained budget; a target ("9B", 0.75; see
    `elastic_checkpoint.find_submodel`); or a Submodel that is nested with the trained ones.

    `.members` are the submodels of the trained budgets and the parent, smallest first.
    """

    def __init__(self, directory: str | os.PathLike, dtype: torch.dtype | None, device: torch.device | str):
        self.directory, self.config = directory, hf.read_config(directory)
        self.layout = architectures.parameter_layout(self.config)
        content = elastic_checkpoint.read(directory)
        self.budgets = {
            name: Submodel(**entry["submodel"]).resolve(self.config) for name, entry in content["budgets"].items()
        }
        path = [Submodel(**values).resolve(self.config) for values in content["path"]]
        with named(directory):
            self.members = nested_chain(self.config, [*self.budgets.values(), full_submodel(self.config)])
            for submodel in path:
                check_nested(self.config, submodel, self.members)
        # All submodels that have to be views, the trained ones first, with their size of every unit key.
        self._sizes = {submodel: submodel.sizes(self.config) for submodel in [*self.members, *path]}
        self._orders: dict[Dim, Tensor | None] = {}
        self._models: dict[Submodel, PreTrainedModel] = {}
        self._generation = generation_values(self.config, directory)  # as `extract` writes it
        self.weights: dict[str, Tensor] = {}  # by parameter name, with rows and columns in stored order
        reader = hf.TensorReader(directory)
        reader.check(architectures.shapes(self.config))
        reader.check_tied_head(next(iter(self.layout)))
        self._gains = norm_gains.read(directory, self.config)
        self._whole_gains = {name: reader.read(name).float() for name in architectures.norm_names(self.config)}
        for name, dims in self.layout.items():
            tensor = reader.read(name)
            for axis, dim in enumerate(dims):
                if (order := self._stored_order(dim, layer_index(name))) is not None:
                    tensor = tensor.index_select(axis, order)
            held = tensor.dtype if dtype is None else architectures.held_in(self.config, name, dtype)
            tensor = tensor.to(device=device, dtype=held)
            self.weights[name] = tensor.clone(memory_format=torch.contiguous_format)  # a copy, not a memory-mapped file

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> NestedModel:
        """Load an elastic checkpoint: a directory with ``elastic.json``. `dtype` None keeps the stored type.

        Raises UserError if the directory has no budgets, or if its budgets are not nested.
        """
        return cls(directory, dtype, device)

    def at(self, budget: BudgetLike) -> PreTrainedModel:
        """The transformers model of a budget, on the shared weights. Raises UserError, see `submodel`."""
        submodel = self.submodel(budget)
        if submodel not in self._models:
            self._models[submodel] = self._build(submodel)
        return self._models[submodel]

    def generate(self, input_ids: Tensor, budget: BudgetLike, **options) -> Tensor:
        """transformers' `generate` with the model of a budget: input_ids (B, L) int64 → (B, L + new tokens).

        It stops at the same tokens as the extracted model, and has the same defaults: those of generation_config.json.
        Rows of different lengths are padded on the left, and `attention_mask` (B, L) is 0 at padding. Raises UserError
        for other padding (see `check_padding`), and for a budget as `submodel` does.
        """
        model = self.at(budget)
        check_padding(self.config, input_ids, model.generation_config, options)
        return model.generate(input_ids, **options)

    def submodel(self, budget: BudgetLike) -> Submodel:
        """The submodel that serves a budget. Raises UserError if there is none, or if it is not nested."""
        if isinstance(budget, Submodel):
            submodel = budget.resolve(self.config)
        elif budget in self.budgets:
            return self.budgets[budget]
        else:
            submodel = elastic_checkpoint.find_submodel(self.directory, budget).resolve(self.config)
        if submodel not in self._sizes:
            check_nested(self.config, submodel, self.members)
        return submodel

    def conversation(self) -> Conversation:
        """A new conversation: a text that several budgets read and continue in turn."""
        return Conversation(self)

    def num_bytes(self) -> int:
        """The bytes of the weights, which all budgets share. Without the small copies that `at` makes per budget."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.weights.values())

    def _stored_order(self, dim: Dim, layer: int | None) -> Tensor | None:
        """The order (rows,) in which the rows of `dim` are stored: those that most sizes use come first.

        None if this is the original order.
        """
        if dim not in self._orders:
            num_users = torch.zeros(dim.size, dtype=torch.int64)  # how many sizes use each row
            for sizes in self._nested_sizes(dim, layer):
                rows = kept_rows(dim, sizes)
                num_users[slice(rows) if isinstance(rows, int) else rows] += 1
            order = num_users.argsort(descending=True, stable=True)
            self._orders[dim] = None if torch.equal(order, torch.arange(dim.size)) else order
        return self._orders[dim]

    def _nested_sizes(self, dim: Dim, layer: int | None) -> list[dict[str, int]]:
        """Sizes of `dim` by unit key. Each uses only rows that all larger ones use too.

        For one axis these are all sizes. For two, they are those of the trained submodels and of those in between.
        """
        keys, nested = elastic_keys(dim), {}
        if isinstance(dim, Units) and dim.groups == 1:  # every size is a prefix already
            return []
        if len(keys) == 1:
            units = next(dim.leaves())
            return [{units.key: size} for size in range(units.groups, units.size, units.groups)]
        for submodel, sizes in self._sizes.items():
            pair = {key: sizes[key] for key in keys}
            if tuple(pair.values()) in nested or not (layer is None or layer in submodel.kept_layers):
                continue
            if all(_all_at_most(pair, other) or _all_at_most(other, pair) for other in nested.values()):
                nested[tuple(pair.values())] = pair
        return list(nested.values())

    def _positions(self, dim: Dim, layer: int | None, sizes: dict[str, int]) -> tuple[int, Tensor | None]:
        """(number of rows that a submodel of `sizes` uses, the position of each of them among the stored rows).

        The second is (rows,) int64, or None if the stored rows are in the right order already. Raises UserError if the
        submodel's rows are not the first stored rows.
        """
        rows = kept_rows(dim, sizes)
        num_rows = rows if isinstance(rows, int) else len(rows)
        order = self._stored_order(dim, layer)
        if order is None:
            order = torch.arange(dim.size)
        stored, positions = order[:num_rows].sort()
        if not torch.equal(stored, torch.arange(num_rows) if isinstance(rows, int) else rows):
            raise UserError(
                "this submodel is nested with the checkpoint's budgets, but its rows are not the first ones in memory; "
                "extract it to serve it by itself"
            )
        return num_rows, None if torch.equal(positions, torch.arange(num_rows)) else positions

    def _build(self, submodel: Submodel) -> PreTrainedModel:
        """A transformers model with views of the weights as parameters.

        Three kinds of parameters are not views: vectors in another order, experts whose rows are kept by groups, and
        norms that have gains for this submodel (norm_gains.py).
        """
        model, gains = empty_model(self.config, submodel), self._gains_of(submodel)
        sizes, number = submodel.sizes(self.config), {layer: i for i, layer in enumerate(submodel.kept_layers)}
        for name, dims in self.layout.items():
            layer = layer_index(name)
            if layer is not None and layer not in number:
                continue
            weight, positions = self.weights[name], []
            for axis, dim in enumerate(dims):
                num_rows, along_axis = self._positions(dim, layer, sizes)
                weight = weight.narrow(axis, 0, num_rows)
                positions.append(along_axis)
            if name in gains:
                weight = gains[name][: submodel.hidden_size].to(weight)
            if layer is not None:
                name = name.replace(f"layers.{layer}.", f"layers.{number[layer]}.", 1)
            set_parameter(model, name, weight, positions)
        architectures.of(self.config).finish(model, weight.device)
        model.generation_config = self._generation_config()
        return model.eval()

    def _gains_of(self, submodel: Submodel) -> norm_gains.Gains:
        return norm_gains.gains_of(self._gains, self.config, submodel, self._whole_gains.__getitem__)

    def _generation_config(self) -> GenerationConfig:
        try:
            return GenerationConfig.from_dict(self._generation)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{self.directory}/generation_config.json: transformers does not accept it ({error}); correct the file"
            ) from None


def _all_at_most(sizes: dict[str, int], others: dict[str, int]) -> bool:
    return all(size <= others[key] for key, size in sizes.items())


def nested_chain(config, submodels: list[Submodel]) -> list[Submodel]:
    """The distinct submodels, smallest first. Raises UserError unless each is nested in the next."""
    chain = sorted(set(submodels), key=lambda submodel: num_parameters(config, submodel))
    for smaller, larger in itertools.pairwise(chain):
        if not smaller.is_within(larger, config):
            raise UserError(f"budgets: {smaller} is not nested in {larger}; extract it to serve it by itself")
    return chain


def check_nested(config, submodel: Submodel, members: list[Submodel]) -> None:
    """Raise UserError unless `submodel` lies within or contains each of `members`."""
    for member in members:
        if not (submodel.is_within(member, config) or member.is_within(submodel, config)):
            raise UserError(f"budgets: {submodel} is not nested in {member}; extract it to serve it by itself")


class Conversation:
    """A text that several budgets read and continue in turn. `.input_ids` (B, L) int64 is the text so far, or None.

    Every budget has a cache of its own, because the states of Mamba and attention layers depend on the budget. When it
    is a budget's turn, it first reads what others have added. So it generates the same tokens as the extracted model
    would for the same text.

    With ``hand_over``, a budget starts from the cache of a larger budget: it takes the states of its own layers, heads
    and channels, and reads only the rest of the text. This is faster, but the states are not those that the smaller
    budget would have computed, so the tokens can differ. The reverse is not possible: the cache of a smaller budget has
    no states for the layers, heads and channels that only the larger budget has.
    """

    def __init__(self, model: NestedModel):
        self.model, self.input_ids = model, None
        self.caches: dict[Submodel, Cache] = {}  # the states of each budget after the text that it has read

    def say(self, input_ids: Tensor) -> None:
        """Append tokens to the text: (B, L) int64."""
        self.input_ids = input_ids if self.input_ids is None else torch.cat([self.input_ids, input_ids], dim=1)

    def generate(self, budget: BudgetLike, hand_over: bool = False, **options) -> Tensor:
        """Continue the text with the model of a budget. Returns the new tokens (B, N), which are appended to the text.

        `options` are those of transformers' `generate`. Raises UserError if there is no text yet.
        """
        if self.input_ids is None:
            raise UserError("conversation: there is no text yet; start with say(input_ids)")
        submodel, length = self.model.submodel(budget), self.input_ids.shape[1]
        model = self.model.at(submodel)
        if hand_over:
            self._take_over(submodel)
        cache = self.caches.setdefault(submodel, DynamicCache(config=model.config))
        no_padding = torch.ones_like(self.input_ids)  # Without a mask, transformers would guess padding from token ids.
        self.input_ids = model.generate(
            self.input_ids, attention_mask=no_padding, past_key_values=cache, use_cache=True, **options
        )
        return self.input_ids[:, length:]

    def _take_over(self, submodel: Submodel) -> None:
        """Take the submodel's states from the cache of the larger budget that has read the most text.

        Nothing happens unless that one has read more than the submodel itself.
        """
        own = self.caches.get(submodel)
        best, num_read = None, 0 if own is None else own.get_seq_length()
        for other, cache in self.caches.items():
            if other != submodel and submodel.is_within(other, self.model.config) and cache.get_seq_length() > num_read:
                best, num_read = other, cache.get_seq_length()
        if best is not None:
            self.caches[submodel] = part_of_cache(self.model.config, self.caches[best], best, submodel)


def part_of_cache(config, cache: Cache, larger: Submodel, smaller: Submodel) -> Cache:
    """A cache for `smaller` with its part of the states in the cache of `larger`. `smaller` is nested in `larger`."""
    layout, part = architectures.parameter_layout(config), DynamicCache(config=submodel_config(config, smaller))
    sizes, larger_sizes = smaller.sizes(config), larger.sizes(config)

    def within(layer: int, name: str) -> Tensor:
        """For each row of a layer's parameter in the smaller submodel, its position among the rows of the larger."""
        dim = layout[f"model.layers.{layer}.{name}"][0]
        rows, larger_rows = kept_rows(dim, sizes), kept_rows(dim, larger_sizes)
        rows, larger_rows = (torch.arange(r) if isinstance(r, int) else r for r in (rows, larger_rows))
        return torch.searchsorted(larger_rows.contiguous(), rows.contiguous())

    for number, layer in enumerate(smaller.kept_layers):
        state = cache.layers[larger.kept_layers.index(layer)]
        architectures.of(config).copy_state(config, layer, state, functools.partial(within, layer), part, number)
    return part
