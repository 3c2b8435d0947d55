"""Importance: which units and layers of a parent matter, from forward passes over calibration batches (method §2).

`rank` scores every width (eqs. 1–4, or by what units write) and every layer (eq. 5); `sort_` permutes the weights once
so that every axis stands in decreasing importance, after which "the k best" is "the first k".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from elastic_core.errors import UserError
from elastic_core.io.atomic import write_text
from elastic_core.model.dims import Units, elastic_units, permute
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.search.depth_ranking import rank_layers
from elastic_core.search.ranking_methods import AGGREGATIONS, DEPTH_METHODS, MEASURES

AGGREGATE = {
    "l1": (torch.abs, lambda total, count: total),
    "l2": (torch.square, lambda total, count: total.sqrt()),
    "mean": (lambda activation: activation, lambda total, count: (total / count).abs()),
}


@dataclass(frozen=True)
class Ranking:
    """Scores and orders of every unit key, and the layers from the most to the least important.

    `scores[key]` and `orders[key]` have the full size of the key, ``expert_ffn`` a row per expert; an order lists units
    by decreasing importance, group by group where the key has groups. `depth_scores[layer]` is the score at which a
    layer was removed.
    """

    scores: dict[str, Tensor]
    orders: dict[str, Tensor]
    depth: tuple[int, ...]
    depth_scores: dict[int, float] = field(default_factory=dict)

    def save(self, path: str | os.PathLike) -> None:
        """Write as JSON."""
        content = {
            "depth": self.depth,
            "depth_scores": {str(layer): score for layer, score in self.depth_scores.items()},
            "scores": {key: value.tolist() for key, value in self.scores.items()},
            "orders": {key: value.tolist() for key, value in self.orders.items()},
        }
        write_text(path, json.dumps(content) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Ranking:
        content = json.loads(Path(path).read_text())
        return cls(
            scores={key: torch.tensor(value, dtype=torch.float64) for key, value in content["scores"].items()},
            orders={key: torch.tensor(value) for key, value in content["orders"].items()},
            depth=tuple(content["depth"]),
            depth_scores={int(layer): score for layer, score in content["depth_scores"].items()},
        )


def rank(
    model: ElasticModel,
    batches: Iterable[Tensor],
    *,
    measure: str = MEASURES[0],
    aggregation: str = AGGREGATIONS[0],
    depth_method: str = DEPTH_METHODS[0],
    depth_batches: int | None = None,
    min_depth: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Ranking:
    """Rank every width and the layers of `model` on `batches` of token ids, each (B, L) int64.

    - `measure`, of neurons, heads and Mamba channels: ``output_norm``, the norm of what a unit adds to the residual
      stream (ours); or ``projection``, the magnitude of what the layer's first projection puts out (eqs. 2–4; of a
      gated MLP, the product).
    - `aggregation` over batch and positions: ``l2`` (√Σa²), ``l1`` (Σ|a|, as in the paper) or ``mean`` (|mean a|).
    - `depth_method`: ``iterative_nmse`` (eq. 5), ``one_shot_nmse`` or ``one_shot_perplexity``.
    - `depth_batches`: how many of the batches score the layers (None: all).
    - `min_depth`: the smallest depth that any budget may choose; iterative ranking stops there.
    - `progress(what, done, total)` is called as work proceeds.
    - `reduce` adds a tensor up over all processes, where several hold different sequences of every batch; they all end
      with the same ranking.

    Raises UserError for an unknown name or batches of another type.
    """
    if measure not in MEASURES:
        raise UserError(f"measure: got {measure!r}; allowed: {', '.join(MEASURES)}")
    if aggregation not in AGGREGATIONS:
        raise UserError(f"aggregation: got {aggregation!r}; allowed: {', '.join(AGGREGATIONS)}")
    if depth_method not in DEPTH_METHODS:
        raise UserError(f"depth_method: got {depth_method!r}; allowed: {', '.join(DEPTH_METHODS)}")
    batches = list(batches)
    if not batches or any(ids.dim() != 2 or ids.dtype != torch.int64 or ids.shape[1] < 2 for ids in batches):
        raise UserError("batches: expected one or more int64 tensors (B, L) of token ids with L ≥ 2")
    training = model.training
    model.eval()
    with torch.no_grad():
        scores = score_widths(model, batches, measure, aggregation, progress, reduce)
        depth, depth_scores = rank_layers(model, batches[:depth_batches], depth_method, min_depth, progress, reduce)
    model.train(training)
    units = elastic_units(model.layout)
    orders = {key: order_units(units[key], score) for key, score in scores.items()}
    return Ranking(scores, orders, depth, depth_scores)


def score_widths(
    model: ElasticModel,
    batches: list[Tensor],
    measure: str = MEASURES[0],
    aggregation: str = AGGREGATIONS[0],
    progress: Callable[[str, int, int], None] | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, Tensor]:
    """Importance of every unit of every width, float64, keyed by unit key.

    An expert's activation is its routing weight times the norm of what it says (in the latent space, where experts work
    in one), by either measure; its neurons' are the first projection's output, or what the neuron adds to what the
    expert says, times the routing weight, of the tokens sent there.
    """
    transform, finish = AGGREGATE[aggregation]
    units = elastic_units(model.layout)
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def observe(key: str, activation: Tensor, writes: Tensor | None, owners: Tensor | None) -> None:
        is_same = key == "hidden" or key.startswith("experts.")  # by either measure
        if not is_same and (writes is not None) != (measure == "output_norm"):
            return
        if writes is not None and owners is not None:
            activation = activation.double() * torch.stack([one.double().norm(dim=0) for one in writes])[owners]
        elif writes is not None:
            parts = [units[key].size] if key in units else mamba_sizes(units, key)
            activation = output_norms(activation, writes, math.prod(parts)).unflatten(-1, parts)
        elif key.startswith("attention_heads"):
            activation = activation.norm(dim=-1)  # (B, L, A, head_dim) → magnitude per head
        values = transform(activation.double())
        if owners is None:
            total, count = values.sum((0, 1)), activation.shape[0] * activation.shape[1]
        else:  # (N, neurons), the rows by expert
            num_experts = units[key.replace("expert_ffn", "experts")].size
            total = values.new_zeros(num_experts, values.shape[1]).index_add(0, owners, values)
            count = len(owners)
        totals[key] = totals[key] + total if key in totals else total
        counts[key] = counts.get(key, 0) + count

    sliced = model.slice(observe=observe)
    for done, input_ids in enumerate(batches, 1):
        model.hidden_states(input_ids, sliced)
        if progress:
            progress("widths", done, len(batches))
    # One message for all: unit keys come in the same order everywhere.
    everything = reduce(
        torch.cat(
            [*(total.flatten() for total in totals.values()), torch.tensor(list(counts.values())).to(totals["hidden"])]
        )
    )
    *sums, numbers = everything.cpu().split([*(total.numel() for total in totals.values()), len(counts)])
    scores = {
        key: finish(flat.view_as(totals[key]), number) for key, flat, number in zip(totals, sums, numbers, strict=True)
    }
    for key in [key for key in scores if key.startswith("mamba.")]:
        layer = key.removeprefix("mamba.")
        heads, channels = score_mamba(scores.pop(key))
        scores |= {f"mamba_heads.{layer}": heads, f"mamba_channels.{layer}": channels}
    return scores


def mamba_sizes(units: dict[str, Units], key: str) -> list[int]:
    """Heads and channels of the Mamba layer whose activations are observed as `key`."""
    layer = key.removeprefix("mamba.")
    return [units[f"{axis}.{layer}"].size for axis in ("mamba_heads", "mamba_channels")]


def output_norms(inputs: Tensor, weight: Tensor, num_units: int) -> Tensor:
    """‖W_u x_u‖₂ per unit u: inputs (B, L, units · size), weight (hidden, units · size) → (B, L, units), float64."""
    columns = weight.double().T.unflatten(0, (num_units, -1))  # (units, size, hidden)
    inputs = inputs.double().unflatten(-1, (num_units, -1))
    gram = columns @ columns.mT  # size² numbers per unit in place of hidden · size
    return (torch.einsum("...us,ust->...ut", inputs, gram) * inputs).sum(-1).clamp(min=0).sqrt()


def score_mamba(s: Tensor) -> tuple[Tensor, Tensor]:
    """Head and channel scores of one Mamba layer from its aggregated activations s (heads, channels).

    Channels: ‖s[:, d]‖₂ over heads (eq. 3). Heads: ‖s[h, D_top]‖₂ over the best half of the channels only (eq. 4).
    """
    channels = s.norm(dim=0)
    top = channels.topk(max(1, s.shape[1] // 2)).indices
    return s[:, top].norm(dim=1), channels


def order_units(units: Units, score: Tensor) -> Tensor:
    """Units by decreasing score, each group's in the group's own places; of a row per expert, each row's."""
    if score.dim() == 2:
        return score.argsort(dim=1, descending=True, stable=True)
    grouped = score.view(units.groups, -1)
    order = grouped.argsort(dim=1, descending=True, stable=True)
    return (order + torch.arange(units.groups)[:, None] * grouped.shape[1]).flatten()


@torch.no_grad()
def sort_(model: ElasticModel, ranking: Ranking) -> ElasticModel:
    """Permute the weights in place so that every axis stands in decreasing importance; the function stays the same.

    Raises ValueError where an order is no permutation of the model's units, or moves one out of its group.
    """
    units = elastic_units(model.layout)
    for key, order in ranking.orders.items():
        if key not in units:
            raise UserError(f"ranking: key {key!r} is not in this model; rank it again with this model's configuration")
        groups = torch.arange(units[key].size) // (units[key].size // units[key].groups)
        rows = (units[key.replace("expert_ffn", "experts")].size,) if order.dim() == 2 else ()  # neurons of experts
        shape = (*rows, units[key].size)
        all_units = torch.arange(units[key].size).expand(shape)
        is_permutation = order.shape == shape and torch.equal(order.sort().values, all_units)
        if not is_permutation or not torch.equal(groups[order], groups.expand(shape)):
            raise UserError(f"ranking: the order of {key!r} is not a permutation within the groups of this model")
    for name, parameter in model.named_parameters():
        parameter.copy_(permute(parameter, model.layout[name], ranking.orders))
    return model
