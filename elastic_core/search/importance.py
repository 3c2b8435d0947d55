"""Importance: score the units and layers of a parent by forward passes over calibration data.

`rank` scores the units of every axis (eqs. 1–4, or by output norm) and every layer (eq. 5). `sort_` permutes the
weights once, so that the units of every axis are in decreasing order of importance. From then on, the k most important
units are the first k units.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from elastic_core.data.loader import Batch
from elastic_core.errors import UserError
from elastic_core.io.atomic import write_text
from elastic_core.io.json_files import read_json
from elastic_core.model.dims import Units, elastic_units, permute
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.search.calibration import calibration_texts
from elastic_core.search.depth_ranking import ADVICE, rank_layers
from elastic_core.search.ranking_methods import AGGREGATIONS, DEPTH_METHODS, MEASURES
from elastic_core.search.ranking_state import RankingState

# How activations are combined over batch and positions: a function of each activation, and one of (sum, count).
AGGREGATE = {
    "l1": (torch.abs, lambda total, count: total),
    "l2": (torch.square, lambda total, count: total.sqrt()),
    "mean": (lambda activation: activation, lambda total, count: (total / count).abs()),
}


SHAPE = {"depth": [int], "depth_scores": {str: float}, "scores": {str: list}, "orders": {str: list}}  # of its file


@dataclass(frozen=True)
class Ranking:
    """The scores and the order of the units of every unit key, and the ranking of the layers.

    - `scores[key]`: (units,) float64; for ``expert_ffn``, (experts, neurons).
    - `orders[key]`: same shape, int64: unit numbers by decreasing score. Where a key has groups, each group is ordered
      for itself and keeps its place.
    - `depth`: all layers, from the most to the least important.
    - `depth_scores[layer]`: the score of a layer; for the iterative method, the score at its removal.
    """

    scores: dict[str, Tensor]
    orders: dict[str, Tensor]
    depth: tuple[int, ...]
    depth_scores: dict[int, float] = field(default_factory=dict)

    def save(self, path: str | os.PathLike) -> None:
        """Write the ranking to `path` as JSON."""
        content = {
            "depth": self.depth,
            "depth_scores": {str(layer): score for layer, score in self.depth_scores.items()},
            "scores": {key: value.tolist() for key, value in self.scores.items()},
            "orders": {key: value.tolist() for key, value in self.orders.items()},
        }
        write_text(path, json.dumps(content) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Ranking:
        """Read what `save` has written. Raises UserError for another or a damaged file."""
        content = read_json(path, shape=SHAPE)
        try:
            return cls(
                scores={key: torch.tensor(value, dtype=torch.float64) for key, value in content["scores"].items()},
                orders={key: torch.tensor(value, dtype=torch.int64) for key, value in content["orders"].items()},
                depth=tuple(content["depth"]),
                depth_scores={int(layer): score for layer, score in content["depth_scores"].items()},
            )
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise UserError(f"{path}: is not a ranking ({error}); run stage rank again") from None


def rank(
    model: ElasticModel,
    batches: Iterable[Tensor | Batch],
    *,
    measure: str = MEASURES[0],
    aggregation: str = AGGREGATIONS[0],
    depth_method: str = DEPTH_METHODS[0],
    depth_batches: int | None = None,
    min_depth: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
    state: RankingState | None = None,
) -> Ranking:
    """Rank the units of every axis and the layers of `model` on calibration texts.

    - `batches`: token ids, each (B, L) int64 with L ≥ 2 and every row one document; or a loader's batches, in which the
      documents of a row do not see each other.
    - `measure`: how neurons, heads and Mamba channels are scored. ``output_norm`` (ours): the norm of the vector that a
      unit adds to the residual stream. ``projection``: the magnitude of the output of the layer's first projection
      (eqs. 2–4); in a gated MLP, of act(gate)·up. Hidden channels are always scored by eq. 1.
    - `aggregation`: how activations a are combined over batch and positions: ``l2`` (√Σa²), ``l1`` (Σ|a|, as in the
      paper) or ``mean`` (|mean a|).
    - `depth_method`: ``iterative_nmse`` (eq. 5), ``one_shot_nmse`` or ``one_shot_perplexity``.
    - `depth_batches`: the layers are scored on the first so many batches (None: on all).
    - `min_depth`: the smallest number of layers that any budget may keep. Iterative ranking stops there.
    - `progress(what, done, total)` is called as work proceeds.
    - `reduce` returns the sum of a tensor over all processes, when each process holds other sequences of every batch.
      All processes then get the same ranking.
    - `state`: what an earlier call with the same arguments had finished when it was stopped (None: nothing is kept).

    Raises UserError for an unknown name, a `min_depth` that is out of range, batches of another type or shape, and for
    a model whose activations or logits are all zero or not finite.
    """
    if measure not in MEASURES:
        raise UserError(f"measure: got {measure!r}; allowed: {', '.join(MEASURES)}")
    if aggregation not in AGGREGATIONS:
        raise UserError(f"aggregation: got {aggregation!r}; allowed: {', '.join(AGGREGATIONS)}")
    if depth_method not in DEPTH_METHODS:
        raise UserError(f"depth_method: got {depth_method!r}; allowed: {', '.join(DEPTH_METHODS)}")
    batches = list(batches)
    state = state or RankingState()
    training = model.training
    model.eval()
    with torch.no_grad():
        scores = score_widths(model, batches, measure, aggregation, progress, reduce, state)
        _check_scores(scores)
        depth, depth_scores = rank_layers(
            model, batches[:depth_batches], depth_method, min_depth, progress, reduce, state
        )
    model.train(training)
    units = elastic_units(model.layout)
    orders = {key: order_units(units[key], score) for key, score in scores.items()}
    return Ranking(scores, orders, depth, depth_scores)


def _check_scores(scores: dict[str, Tensor]) -> None:
    """Raise UserError for scores that are not finite, or if no hidden channel has any activation."""
    for key, score in scores.items():
        if not bool(score.isfinite().all()):
            raise UserError(f"rank: the scores of {key} are not finite; {ADVICE}")
    if not bool(scores["hidden"].any()):
        raise UserError(f"rank: all activations of the model are zero; {ADVICE}")


def score_widths(
    model: ElasticModel,
    batches: Iterable[Tensor | Batch],
    measure: str = MEASURES[0],
    aggregation: str = AGGREGATIONS[0],
    progress: Callable[[str, int, int], None] | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
    state: RankingState | None = None,
) -> dict[str, Tensor]:
    """The importance of every unit of every axis but depth, float64, by unit key (see `Ranking.scores`).

    For an expert, both measures are the same: its routing weight times the norm of its output (in the latent space, if
    the experts work in a latent space). For a neuron of an expert, only the tokens that are sent to this expert count.
    ``projection`` takes the first projection's output, ``output_norm`` the norm of what the neuron adds to the expert's
    output; both are multiplied by the routing weight. The other arguments are those of `rank`.
    """
    transform, finish = AGGREGATE[aggregation]
    units = elastic_units(model.layout)
    state = state or RankingState()
    finished, totals, counts = state.load_widths()
    texts = calibration_texts(batches)
    totals = {key: total.to(texts[0].input_ids.device) for key, total in totals.items()}

    def observe(key: str, activation: Tensor, writes: Tensor | None, owners: Tensor | None) -> None:
        """Add one report of the model to `totals` and `counts` (see `Slice`)."""
        # The model reports a unit twice, once per measure: with `writes`, the matrix that it is multiplied by, and
        # without. Hidden channels and experts are reported once, because their score is the same by both measures.
        is_same_for_both = key == "hidden" or key.startswith("experts.")
        if not is_same_for_both and (writes is not None) != (measure == "output_norm"):
            return
        if writes is not None and owners is not None:
            activation = activation.double() * torch.stack([one.double().norm(dim=0) for one in writes])[owners]
        elif writes is not None:
            parts = [units[key].size] if key in units else mamba_sizes(units, key)
            activation = output_norms(activation, writes, math.prod(parts)).unflatten(-1, parts)
        elif key.startswith("attention_heads"):
            activation = activation.norm(dim=-1)  # (B, L, heads, head_dim) → (B, L, heads)
        values = transform(activation.double())
        if owners is None:
            total, count = values.sum((0, 1)), activation.shape[0] * activation.shape[1]
        else:  # values: (N, neurons); owners: (N,), the expert of each row
            num_experts = units[key.replace("expert_ffn", "experts")].size
            total = values.new_zeros(num_experts, values.shape[1]).index_add(0, owners, values)
            count = len(owners)
        totals[key] = totals[key] + total if key in totals else total
        counts[key] = counts.get(key, 0) + count

    sliced = model.slice(observe=observe)
    for done, part in enumerate(texts[finished:], finished + 1):
        model.hidden_states(part.input_ids, sliced, part.documents)
        if state.save is not None:
            state.save_widths(done, *_over_all_processes(totals, counts, reduce))
        if progress:
            progress("widths", done, len(texts))
    sums, numbers = _over_all_processes(totals, counts, reduce)
    scores = {key: finish(total, numbers[key]) for key, total in sums.items()}
    for key in [key for key in scores if key.startswith("mamba.")]:
        layer = key.removeprefix("mamba.")
        heads, channels = score_mamba(scores.pop(key))
        scores |= {f"mamba_heads.{layer}": heads, f"mamba_channels.{layer}": channels}
    return scores


def _over_all_processes(
    totals: dict[str, Tensor], counts: dict[str, int], reduce: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The sums and counts over all processes, in CPU memory, by one message.

    One message works because unit keys come in the same order in all processes.
    """
    numbers = torch.tensor(list(counts.values())).to(totals["hidden"])
    everything = reduce(torch.cat([*(total.flatten() for total in totals.values()), numbers]))
    *sums, numbers = everything.cpu().split([*(total.numel() for total in totals.values()), len(counts)])
    sums = {key: flat.view_as(totals[key]) for key, flat in zip(totals, sums, strict=True)}
    return sums, dict(zip(counts, numbers.tolist(), strict=True))


def mamba_sizes(units: dict[str, Units], key: str) -> list[int]:
    """[number of heads, number of channels per head] of a Mamba layer. `key`: "mamba." and the layer's number."""
    layer = key.removeprefix("mamba.")
    return [units[f"{axis}.{layer}"].size for axis in ("mamba_heads", "mamba_channels")]


def output_norms(inputs: Tensor, weight: Tensor, num_units: int) -> Tensor:
    """‖W_u x_u‖₂ of each unit u: the norm of what it adds to the layer's output.

    inputs (B, L, units · size), weight (hidden, units · size) → (B, L, units) float64. x_u are the `size` inputs of
    unit u, and W_u its columns of the weight.
    """
    columns = weight.double().T.unflatten(0, (num_units, -1))  # (units, size, hidden)
    inputs = inputs.double().unflatten(-1, (num_units, -1))  # (B, L, units, size)
    gram = columns @ columns.mT  # W_uᵀW_u, (units, size, size): then a position costs size² per unit, not hidden · size
    return (torch.einsum("...us,ust->...ut", inputs, gram) * inputs).sum(-1).clamp(min=0).sqrt()


def score_mamba(s: Tensor) -> tuple[Tensor, Tensor]:
    """(head scores (heads,), channel scores (channels,)) of one Mamba layer, from its activations s (heads, channels).

    `s` is aggregated over batch and positions. Channel d: ‖s[:, d]‖₂, over all heads (eq. 3). Head h: ‖s[h, D_top]‖₂,
    where D_top is the half of the channels with the highest scores (eq. 4).
    """
    channels = s.norm(dim=0)
    top = channels.topk(max(1, s.shape[1] // 2)).indices
    return s[:, top].norm(dim=1), channels


def order_units(units: Units, score: Tensor) -> Tensor:
    """Unit numbers by decreasing score. Units stay in their group, and groups keep their places.

    score (units,) → (units,). For the neurons of experts: (experts, neurons), each row ordered for itself.
    """
    if score.dim() == 2:
        return score.argsort(dim=1, descending=True, stable=True)
    grouped = score.view(units.groups, -1)
    order = grouped.argsort(dim=1, descending=True, stable=True)
    return (order + torch.arange(units.groups)[:, None] * grouped.shape[1]).flatten()


@torch.no_grad()
def sort_(model: ElasticModel, ranking: Ranking) -> ElasticModel:
    """Permute the weights in place so that the units of every axis are in decreasing order of importance.

    The model computes the same function as before, up to rounding. Raises UserError if an order is not a permutation of
    the model's units, or if it moves a unit to another group.
    """
    units = elastic_units(model.layout)
    for key, order in ranking.orders.items():
        if key not in units:
            raise UserError(f"ranking: key {key!r} is not in this model; rank it again with this model's configuration")
        groups = torch.arange(units[key].size) // (units[key].size // units[key].groups)
        rows = (units[key.replace("expert_ffn", "experts")].size,) if order.dim() == 2 else ()  # one row per expert
        shape = (*rows, units[key].size)
        all_units = torch.arange(units[key].size).expand(shape)
        is_permutation = order.shape == shape and torch.equal(order.sort().values, all_units)
        if not is_permutation or not torch.equal(groups[order], groups.expand(shape)):
            raise UserError(f"ranking: the order of {key!r} is not a permutation within the groups of this model")
    for name, parameter in model.named_parameters():
        parameter.copy_(permute(parameter, model.layout[name], ranking.orders))
    return model
