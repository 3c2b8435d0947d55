"""Importance: score the units of every axis by forward passes over calibration texts (eqs. 1–4, or by output norm)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elastic_core.model import architectures
from elastic_core.model.dims import Units, elastic_units
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.search.importance.basis import directions
from elastic_core.search.importance.calibration import Texts
from elastic_core.search.importance.methods import AGGREGATIONS, MEASURES
from elastic_core.search.importance.state import RankingState

# How activations are combined over batch and positions: a function of each activation, and one of (sum, count).
AGGREGATE = {
    "l1": (torch.abs, lambda total, count: total),
    "l2": (torch.square, lambda total, count: total.sqrt()),
    "mean": (lambda activation: activation, lambda total, count: (total / count).abs()),
}

RESIDUAL = "residual"  # the key of Σ x̂·x̂ᵀ among the sums of `score_widths`


def score_widths(
    model: ElasticModel,
    texts: Sequence[Texts],
    measure: str = MEASURES[0],
    aggregation: str = AGGREGATIONS[0],
    progress: Callable[[str, int, int], None] | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
    state: RankingState | None = None,
    with_moment: bool = False,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """(importance of every unit of every axis but depth, Σ x̂·x̂ᵀ), both float64.

    The importance is by unit key (see `Ranking.scores`). The sum (hidden, hidden) is over the inputs of all norms (see
    `directions`); None without `with_moment`.

    For an expert, both measures are the same: its routing weight times the norm of its output (in the latent space, if
    the experts work in a latent space). For a neuron of an expert, only the tokens that are sent to this expert count.
    ``projection`` takes the first projection's output, ``output_norm`` the norm of what the neuron adds to the expert's
    output; both are multiplied by the routing weight. The other arguments are those of `rank`.
    """
    transform, finish = AGGREGATE[aggregation]
    units = elastic_units(model.layout)
    state = state or RankingState()
    finished, totals, counts = state.load_widths()
    norms = set(architectures.norm_names(model.config)) if with_moment else set()
    totals = {key: total.to(texts[0].input_ids.device) for key, total in totals.items()}

    def observe(key: str, activation: Tensor, writes: Tensor | None, owners: Tensor | None) -> None:
        """Add one report of the model to `totals` and `counts` (see `Slice`)."""
        if key in norms:
            x = directions(activation)
            totals[RESIDUAL] = totals.get(RESIDUAL, 0) + x.T @ x
            counts[RESIDUAL] = counts.get(RESIDUAL, 0) + len(x)
        if key.endswith(".weight"):  # the input of a norm
            return
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
    moment = sums.pop(RESIDUAL, None)
    scores = {key: finish(total, numbers[key]) for key, total in sums.items()}
    for key in [key for key in scores if key.startswith("mamba.")]:
        layer = key.removeprefix("mamba.")
        heads, channels = score_mamba(scores.pop(key))
        scores |= {f"mamba_heads.{layer}": heads, f"mamba_channels.{layer}": channels}
    return scores, moment


def _over_all_processes(
    totals: dict[str, Tensor], counts: dict[str, int], reduce: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The sums and counts over all processes, in CPU memory, by one message.

    One message works because keys come in the same order in all processes.
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
