"""Rank the units of every axis and the layers of a model on calibration texts, and choose the basis of its channels."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from elastic_core.data.loader import Batch
from elastic_core.errors import UserError
from elastic_core.io import tensor_files
from elastic_core.io.atomic import whole_file, write_text
from elastic_core.io.json_files import read_json
from elastic_core.io.tensor_files import open_checked, read_header
from elastic_core.model.dims import elastic_units
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.search.importance.basis import check_basis, measure_ratios, principal_axes
from elastic_core.search.importance.calibration import calibration_texts
from elastic_core.search.importance.depth import ADVICE, rank_layers
from elastic_core.search.importance.methods import AGGREGATIONS, BASES, DEPTH_METHODS, MEASURES
from elastic_core.search.importance.state import RankingState
from elastic_core.search.importance.widths import order_units, score_widths

SHAPE = {  # of its file
    **{"depth": [int], "depth_scores": {str: float}, "scores": {str: list}, "orders": {str: list}},
    "tensors?": [str],  # the names in the file beside it
}


@dataclass(frozen=True)
class Ranking:
    """The scores and the order of the units of every unit key, and the ranking of the layers.

    - `scores[key]`: (units,) float64; for ``expert_ffn``, (experts, neurons).
    - `orders[key]`: same shape, int64: unit numbers by decreasing score. Where a key has groups, each group is ordered
      for itself and keeps its place.
    - `depth`: all layers, from the most to the least important.
    - `depth_scores[layer]`: the score of a layer; for the iterative method, the score at its removal.
    - `axes`: the principal axes of the residual stream, columns of an orthogonal matrix (hidden, hidden) float64. With
      them, the channels of the sorted model are these axes, and `orders["hidden"]` changes nothing. None: no rotation.
    - `norm_ratios`: see `NormRatios.ratios`; for the channels of the sorted model. Empty without `private_norms`.
    """

    scores: dict[str, Tensor]
    orders: dict[str, Tensor]
    depth: tuple[int, ...]
    depth_scores: dict[int, float] = field(default_factory=dict)
    axes: Tensor | None = None
    norm_ratios: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: str | os.PathLike) -> None:
        """Write the ranking to `path` as JSON. Axes and norm ratios are beside it, in a safetensors file."""
        tensors = self.norm_ratios | ({} if self.axes is None else {"axes": self.axes.contiguous()})
        if tensors:
            with whole_file(_tensors_of(path)) as partial:
                tensor_files.save(tensors, partial)
        content = {
            "tensors": list(tensors),
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
        tensors = _read_tensors(path, content["tensors"]) if content.get("tensors") else {}
        try:
            return cls(
                scores={key: torch.tensor(value, dtype=torch.float64) for key, value in content["scores"].items()},
                orders={key: torch.tensor(value, dtype=torch.int64) for key, value in content["orders"].items()},
                depth=tuple(content["depth"]),
                depth_scores={int(layer): score for layer, score in content["depth_scores"].items()},
                axes=tensors.pop("axes", None),
                norm_ratios=tensors,
            )
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise UserError(f"{path}: is not a ranking ({error}); run stage rank again") from None


def _tensors_of(path: str | os.PathLike) -> Path:
    return Path(path).with_suffix(".safetensors")


def _read_tensors(path: str | os.PathLike, names: list[str]) -> dict[str, Tensor]:
    """The tensors `names` of the file beside a ranking: the axes in float64, norm ratios in float32."""
    file = _tensors_of(path)
    if not file.is_file():
        raise UserError(f"{file}: is missing, but {path} needs it; run stage rank again")
    if missing := sorted(set(names) - read_header(file).keys()):
        raise UserError(f"{file}: lacks {', '.join(missing[:3])}; run stage rank again")
    with open_checked(file) as handle:
        tensors = {name: handle.get_tensor(name) for name in names}
    return {name: tensor.double() if name == "axes" else tensor.float() for name, tensor in tensors.items()}


def rank(
    model: ElasticModel,
    batches: Iterable[Tensor | Batch],
    *,
    basis: str = BASES[0],
    private_norms: bool = True,
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
    - `basis`: the channels of the residual stream in the sorted model. ``principal`` (ours): its principal axes on the
      calibration texts (basis.py). ``channels``: the model's own, by decreasing score.
    - `private_norms`: measure how the norms of submodels have to differ (norm_gains.py).
    - `measure`: how neurons, heads and Mamba channels are scored. ``output_norm`` (ours): the norm of the vector that a
      unit adds to the residual stream. ``projection``: the magnitude of the output of the layer's first projection
      (eqs. 2–4); in a gated MLP, of act(gate)·up. Hidden channels are always scored by eq. 1.
    - `aggregation`: how activations a are combined over batch and positions: ``l2`` (√Σa²), ``l1`` (Σ|a|, as in the
      paper) or ``mean`` (|mean a|).
    - `depth_method`: ``iterative_nmse`` (eq. 5), ``one_shot_nmse`` or ``one_shot_perplexity``.
    - `depth_batches`: the layers are scored, and norm ratios measured, on the first so many batches (None: on all).
    - `min_depth`: the smallest number of layers that any budget may keep. Iterative ranking stops there.
    - `progress(what, done, total)` is called as work proceeds.
    - `reduce` returns the sum of a tensor over all processes, when each process holds other sequences of every batch.
      All processes then get the same ranking.
    - `state`: what an earlier call with the same arguments had finished when it was stopped (None: nothing is kept).

    Raises UserError for an unknown name, a `min_depth` that is out of range, batches of another type or shape, tied
    embeddings with basis ``principal``, and for a model whose activations or logits are all zero or not finite.
    """
    _check_names(basis=(basis, BASES), measure=(measure, MEASURES), aggregation=(aggregation, AGGREGATIONS))
    _check_names(depth_method=(depth_method, DEPTH_METHODS))
    is_rotated = basis == "principal"
    if is_rotated:
        check_basis(model.config)
    batches, state, units = list(batches), state or RankingState(), elastic_units(model.layout)
    texts, training = calibration_texts(batches), model.training
    model.eval()
    with torch.no_grad():
        scores, moment = score_widths(model, texts, measure, aggregation, progress, reduce, state, is_rotated)
        _check_scores(scores)
        orders = {key: order_units(units[key], score) for key, score in scores.items()}
        axes, ratios = None, {}
        if is_rotated:
            axes, orders["hidden"] = principal_axes(moment), torch.arange(model.config.hidden_size)
        if private_norms:
            measured, order = texts[:depth_batches], orders["hidden"]
            ratios = state.ratios(lambda: measure_ratios(model, measured, axes, order, reduce))
        depth, depth_scores = rank_layers(
            model, batches[:depth_batches], depth_method, min_depth, progress, reduce, state
        )
    model.train(training)
    return Ranking(scores, orders, depth, depth_scores, axes, ratios)


def _check_names(**given: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, allowed) in given.items():
        if value not in allowed:
            raise UserError(f"{name}: got {value!r}; allowed: {', '.join(allowed)}")


def _check_scores(scores: dict[str, Tensor]) -> None:
    """Raise UserError for scores that are not finite, or if no hidden channel has any activation."""
    for key, score in scores.items():
        if not bool(score.isfinite().all()):
            raise UserError(f"rank: the scores of {key} are not finite; {ADVICE}")
    if not bool(scores["hidden"].any()):
        raise UserError(f"rank: all activations of the model are zero; {ADVICE}")
