"""Depth ranking: score each layer by the normalized MSE of the logits when the layer is left out (eq. 5)."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elastic_core.data.loader import IGNORED_LABEL, Batch
from elastic_core.errors import UserError
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.model.ops.cross_entropy import chunked_cross_entropy
from elastic_core.search.importance.basis import parts_of
from elastic_core.search.importance.calibration import Texts, calibration_texts
from elastic_core.search.importance.methods import DEPTH_METHODS
from elastic_core.search.importance.state import RankingState

Progress = Callable[[str, int, int], None] | None
Reduce = Callable[[Tensor], Tensor]

ADVICE = "check the weights of the model: they may be damaged or untrained"
MIN_PIECES = 8  # of calibration data, for the iterative method
HELD_BYTES = 1 << 30  # Final hidden states up to this size stay on the device. The others are computed again each time.
HEAD_VALUES = 1 << 25  # of the head that are in float64 at one time


def rank_layers(
    model: ElasticModel,
    batches: Sequence[Tensor | Batch],
    method: str = DEPTH_METHODS[0],
    min_depth: int = 1,
    progress: Progress = None,
    reduce: Reduce = lambda sums: sums,
    state: RankingState | None = None,
) -> tuple[tuple[int, ...], dict[int, float]]:
    """Rank the layers: (layers from the most to the least important, score of each layer).

    - `batches`: see `calibration_texts`.
    - `method`: a name of `METHODS`.
    - `min_depth`: the smallest number of layers that any budget may keep. The iterative method stops there; layers that
      it never removes have no score.
    - `progress(what, done, total)` is called as work proceeds.
    - `reduce` returns the sum of a tensor over all processes, when each process holds other sequences of every batch.
    - `state`: what an earlier call with the same arguments had finished when it was stopped.

    The final hidden states of the full model stay in memory for as many batches as fit in HELD_BYTES. Logits are never
    stored. Raises UserError for a `min_depth` outside 1 to the number of layers, and for logits that are all zero or
    not finite.
    """
    num_layers = len(model.model.layers)
    if not 1 <= min_depth <= num_layers:
        raise UserError(f"min_depth: got {min_depth}; allowed: 1 to {num_layers}, the parent's layers")
    if not bool(model.head(model.slice()).any()):
        raise UserError(f"rank: the head of the model is zero, so its layers cannot be ranked; {ADVICE}")
    state = state or RankingState()
    # For the iterative method, every batch is split into pieces: a candidate can be ruled out after each of them.
    num_parts = -(-MIN_PIECES // max(1, len(batches))) if method == "iterative_nmse" else 1
    texts = calibration_texts(batches, num_parts)
    # The shapes with padding are the same on all processes. So all of them take over what was saved, or none does.
    shapes = [list((batch.input_ids if isinstance(batch, Batch) else batch).shape) for batch in batches]
    state.begin_depth([method, min_depth, num_parts, shapes])
    return METHODS[method](model, texts, min_depth, progress, reduce, state)


class LogitError:
    """Σ(M_full − M_−j)² over all positions and logits (the numerator of eq. 5), computed without the logits.

    Logits are linear in the final hidden states: M = W·x, with the head W (V, D). So the sum equals Σ_t Δ_tᵀ(WᵀW)Δ_t,
    where Δ_t (D,) is the difference of the hidden states at position t. A position then costs D² products instead of
    V·D. `denominator` is Σ M_full², over all processes.
    """

    def __init__(self, model: ElasticModel, texts: list[Texts], reduce: Reduce, state: RankingState | None = None):
        self.model, self.texts, self.sliced, self.reduce = model, texts, model.slice(), reduce
        self.state = state or RankingState()
        self.gram = gram_of(model.head(self.sliced))  # (D, D)
        self._held: dict[int, Tensor] = {}
        total, held_bytes = 0.0, 0
        for batch in range(len(texts)):
            full = self.full(batch)
            total, held_bytes = total + squared(full, self.gram), held_bytes + full.nbytes
            # Processes have different amounts of padding. All of them hold the states of a batch, or none does, because
            # a pass through sharded weights needs all of them.
            if not reduce(torch.tensor(float(held_bytes > HELD_BYTES))):
                self._held[batch] = full
        self.denominator = reduce(total).item()
        if not 0 < self.denominator < math.inf:
            problem = "zero for every text" if self.denominator == 0 else "not finite"
            raise UserError(f"rank: the model's logits are {problem}, so its layers cannot be ranked; {ADVICE}")

    def full(self, batch: int) -> Tensor:
        """The final hidden states (B, L, D) of the full model for batch number `batch`."""
        held = self._held.get(batch)
        texts = self.texts[batch]
        return self.model.hidden_states(texts.input_ids, self.sliced, texts.documents) if held is None else held

    def layer(self, batch: int, layer: int, x: Tensor) -> Tensor:
        """The residual stream (B, L, D) of batch number `batch` after a layer; `x` is that before it."""
        return self.model.model.layers[layer](x, self.sliced, self.texts[batch].documents)

    def __call__(self, batch: int, full: Tensor, x: Tensor, layers: list[int]) -> Tensor:
        """The sum for one batch on this process.

        `x` (B, L, D) is the residual stream before `layers`, the layers that are still to be computed. `full` is
        `self.full(batch)`.
        """
        for layer in layers:
            x = self.layer(batch, layer, x)
        return squared(self.model.model.final_norm(x, self.sliced), self.gram, full)


def gram_of(head: Tensor) -> Tensor:
    """WᵀW (D, D) of the head W (V, D), in float64. A block of rows is in float64 at a time."""
    blocks = (rows.double() for rows in head.split(max(1, HEAD_VALUES // head.shape[1])))
    return functools.reduce(torch.add, (rows.T @ rows for rows in blocks))


def squared(hidden: Tensor, gram: Tensor, other: Tensor | None = None) -> Tensor:
    """Σ Δᵀ(WᵀW)Δ over all positions, in float64. Δ (B, L, D) is `hidden` − `other`; `hidden` without `other`."""
    others, total = itertools.repeat(None) if other is None else parts_of(other), 0.0
    for part, base in zip(parts_of(hidden), others, strict=False):
        if base is not None:
            part = part.to(torch.promote_types(part.dtype, torch.float32)) - base
        part = part.double()
        total = total + ((part @ gram) * part).sum()
    return total


def _sweep(error: LogitError, batch: int, kept: list[int], candidates) -> dict[int, float]:
    """For each candidate layer: the error of one batch when this layer is removed from `kept`, over all processes."""
    return error.state.once(lambda: _compute_sweep(error, batch, kept, candidates))


def _compute_sweep(error: LogitError, batch: int, kept: list[int], candidates) -> dict[int, float]:
    """The layers before a candidate are computed once for all candidates. An error that is not finite is infinite."""
    x, full = error.model.model.embed(error.texts[batch].input_ids, error.sliced), error.full(batch)
    errors = {}
    for position, layer in enumerate(kept):
        if layer in candidates:
            errors[layer] = error(batch, full, x, kept[position + 1 :])
            if len(errors) == len(candidates):
                break
        x = error.layer(batch, layer, x)
    totals = error.reduce(torch.stack(list(errors.values()))).nan_to_num(math.inf, math.inf)
    return dict(zip(errors, totals.tolist(), strict=True))


def _least_important(error: LogitError, kept: list[int]) -> tuple[int, float]:
    """The layer whose removal from `kept` changes the logits least, and its nMSE.

    An error is a sum over batches, and it only grows. So a candidate is ruled out as soon as its partial sum exceeds
    the complete sum of the best candidate. The result is exact.
    """
    totals, others = _sweep(error, 0, kept, set(kept)), range(1, len(error.texts))
    best = min(totals, key=totals.get)
    for batch in others:
        totals[best] += _sweep(error, batch, kept, {best})[best]
    bound, live = totals[best], {layer for layer in kept if layer != best and totals[layer] <= totals[best]}
    for batch in others:
        if not live:
            break
        for layer, value in _sweep(error, batch, kept, live).items():
            totals[layer] += value
        live = {layer for layer in live if totals[layer] <= bound}
    winner = min(live | {best}, key=lambda layer: (totals[layer], layer))
    return winner, totals[winner] / error.denominator


def _iterative_nmse(model, texts, min_depth, progress, reduce, state):
    """Remove the least important layer, score the remaining layers again without it, and so on (eq. 5)."""
    error, kept = LogitError(model, texts, reduce, state), list(range(len(model.model.layers)))
    removed, scores, rounds = [], {}, len(kept) - min_depth
    for done in range(rounds):
        layer, scores[layer] = _least_important(error, kept)
        kept.remove(layer)
        removed.append(layer)
        if progress:
            progress("depth", done + 1, rounds)
    return tuple(kept + removed[::-1]), scores


def _one_shot_nmse(model, texts, min_depth, progress, reduce, state):
    """Score every layer once, by the nMSE of the full model without this layer."""
    error, layers = LogitError(model, texts, reduce, state), list(range(len(model.model.layers)))
    totals = dict.fromkeys(layers, 0.0)
    for batch in range(len(texts)):
        for layer, value in _sweep(error, batch, layers, set(layers)).items():
            totals[layer] += value
        if progress:
            progress("depth", batch + 1, len(texts))
    return _by_score({layer: total / error.denominator for layer, total in totals.items()})


def _one_shot_perplexity(model, texts, min_depth, progress, reduce, state):
    """Score every layer once, by the cross-entropy (nats per token) of the full model without this layer."""
    layers, scores = list(range(len(model.model.layers))), {}
    for layer in layers:
        scores |= state.once(lambda layer=layer: {layer: _loss_without(model, texts, layer, reduce)})
        if not math.isfinite(scores[layer]):
            raise UserError(f"rank: the loss without layer {layer} is not finite; {ADVICE}")
        if progress:
            progress("depth", layer + 1, len(layers))
    return _by_score(scores)


def _loss_without(model: ElasticModel, texts: list[Texts], layer: int, reduce: Reduce) -> float:
    """The cross-entropy of the model without a layer, in nats per token, over all processes."""
    sliced = model.slice()
    sliced.kept_layers = tuple(i for i in range(len(model.model.layers)) if i != layer)
    total = sum(_next_token_loss(model, part, sliced) for part in texts)
    sums = [total, sum(int((part.labels != IGNORED_LABEL).sum()) for part in texts)]
    total, tokens = reduce(torch.tensor(sums, dtype=torch.float64)).tolist()
    return total / tokens


def _next_token_loss(model: ElasticModel, texts: Texts, sliced) -> float:
    hidden = model.hidden_states(texts.input_ids, sliced, texts.documents)
    return chunked_cross_entropy(hidden.flatten(0, 1), model.head(sliced), texts.labels.flatten()).item()


def _by_score(scores: dict[int, float]) -> tuple[tuple[int, ...], dict[int, float]]:
    """(layers by decreasing score, the scores). Equal scores are ordered by layer number."""
    return tuple(sorted(scores, key=lambda layer: (-scores[layer], layer))), scores


METHODS = {
    "iterative_nmse": _iterative_nmse,
    "one_shot_nmse": _one_shot_nmse,
    "one_shot_perplexity": _one_shot_perplexity,
}
