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

import itertools
import os

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from elastic_core.cost.metrics import num_parameters
from elastic_core.data.special_tokens import generation_values
from elastic_core.errors import UserError, named
from elastic_core.export import elastic_checkpoint
from elastic_core.export.conversation import Conversation
from elastic_core.export.elastic_checkpoint import BudgetLike
from elastic_core.export.mixed_batch import generate_mixed
from elastic_core.export.padding import check_padding
from elastic_core.export.view_model import empty_model, set_parameter
from elastic_core.model import architectures, hf, norm_gains
from elastic_core.model.dims import Dim, Units, elastic_keys, kept_rows, layer_index
from elastic_core.model.submodel import Submodel, full_submodel


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
            self.weights[name] = _in_memory(name, tensor)

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

    def generate(self, input_ids: Tensor, budget: BudgetLike | list[BudgetLike], **options) -> Tensor:
        """transformers' `generate` with the model of a budget: input_ids (B, L) int64 → (B, L + new tokens).

        It stops at the same tokens as the extracted model, and has the same defaults: those of generation_config.json.
        Rows of different lengths are padded on the left, and `attention_mask` (B, L) is 0 at padding. `budget`: one for
        all rows, or a list with one per row (see `generate_mixed`). Raises UserError for other padding (see
        `check_padding`), and for a budget as `submodel` does.
        """
        if isinstance(budget, list):
            return generate_mixed(self, input_ids, budget, options)
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
        model.generation_config = self._generation_config(submodel)
        return model.eval()

    def _gains_of(self, submodel: Submodel) -> norm_gains.Gains:
        return norm_gains.gains_of(self._gains, self.config, submodel, self._whole_gains.__getitem__)

    def _generation_config(self, submodel: Submodel) -> GenerationConfig:
        values = self._generation | architectures.cache_values(self.config, submodel.kept_layers)
        try:
            return GenerationConfig.from_dict(values)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{self.directory}/generation_config.json: transformers does not accept it ({error}); correct the file"
            ) from None


def _in_memory(name: str, tensor: Tensor) -> Tensor:
    """A copy of a weight, not a memory-mapped file.

    In float32 on a CPU, the head (vocabulary, hidden) is stored column by column, so that the part of every budget is
    contiguous: a token then takes half the time in this product, also with all columns. bfloat16 is faster by rows.
    """
    if name == "lm_head.weight" and tensor.dtype == torch.float32 and tensor.device.type == "cpu":
        return tensor.t().clone(memory_format=torch.contiguous_format).t()
    return tensor.clone(memory_format=torch.contiguous_format)


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
