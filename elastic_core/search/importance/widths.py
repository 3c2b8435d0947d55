"""Importance: score the units of every axis by forward passes over calibration texts (eqs. 1–4, or by output norm)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elastic_core.model import architectures
from elastic_core.model.dims import Units, elastic_units
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.search.importance.basis import directions, parts_of, wide, without_autocast
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


class WidthSums:
    """Sums over the activations that a model reports: `observe` is the observer of its `Slice`.

    - `totals[key]`: by unit key (see `Ranking.scores`); ``mamba.i`` for the heads and channels of a Mamba layer; and
      with `with_moment`, RESIDUAL. float64, on the device of the activations.
    - `counts[key]`: the number of positions.

    Terms are computed in float64, or in float32 for activations of a 16-bit type. Of an activation, only BLOCK_VALUES
    numbers are in these types at a time.
    """

    def __init__(self, config, units: dict[str, Units], measure: str, aggregation: str, with_moment: bool = False):
        self.units, self.measure, self._transform = units, measure, AGGREGATE[aggregation][0]
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self._norms = set(architectures.norm_names(config)) if with_moment else set()

    def observe(self, key: str, activation: Tensor, writes: Tensor | None, owners: Tensor | None) -> None:
        """Add one report of the model (see `Slice`)."""
        with without_autocast(activation):
            if key in self._norms:
                for part in parts_of(activation):
                    x = directions(part)
                    self._add(RESIDUAL, (x.T @ x).double(), len(x))
            if not key.endswith(".weight"):  # the input of a norm
                self._observe_units(key, activation, writes, owners)

    def _observe_units(self, key: str, activation: Tensor, writes: Tensor | None, owners: Tensor | None) -> None:
        # The model reports a unit twice, once per measure: with `writes`, the matrix that it is multiplied by, and
        # without. Hidden channels and experts are reported once, because their score is the same by both measures.
        is_same_for_both = key == "hidden" or key.startswith("experts.")
        if not is_same_for_both and (writes is not None) != (self.measure == "output_norm"):
            return
        if owners is not None:
            self._observe_experts(key, activation, writes, owners)
            return
        sizes, gram = [], None
        if writes is not None:
            sizes = [self.units[key].size] if key in self.units else mamba_sizes(self.units, key)
            gram = grams(writes, math.prod(sizes))
        for part in parts_of(activation):
            num_positions = part.shape[0] * part.shape[1]
            if gram is not None:
                part = output_norms(part, gram).unflatten(-1, sizes)
            elif key.startswith("attention_heads"):
                part = part.to(torch.promote_types(part.dtype, torch.float32)).norm(dim=-1)  # (B, L, heads, d) → heads
            self._add(key, self._transform(wide(part)).sum((0, 1), dtype=torch.float64), num_positions)

    def _observe_experts(self, key: str, activation: Tensor, writes: Tensor | None, owners: Tensor) -> None:
        """`activation` is (N, neurons); `owners` (N,) has the expert of each row."""
        num_experts = self.units[key.replace("expert_ffn", "experts")].size
        norms = None if writes is None else torch.stack([wide(one).norm(dim=0) for one in writes])
        for part, rows in zip(parts_of(activation, 0), parts_of(owners, 0, activation.shape[1]), strict=True):
            values = self._transform(wide(part) if norms is None else wide(part) * norms[rows]).double()
            total = values.new_zeros(num_experts, values.shape[1]).index_add(0, rows, values)
            self._add(key, total, len(rows))

    def _add(self, key: str, total: Tensor, count: int) -> None:
        self.totals[key] = self.totals[key] + total if key in self.totals else total
        self.counts[key] = self.counts.get(key, 0) + count


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
    state, units = state or RankingState(), elastic_units(model.layout)
    sums = WidthSums(model.config, units, measure, aggregation, with_moment)
    finished, totals, sums.counts = state.load_widths()
    sums.totals = {key: total.to(texts[0].input_ids.device) for key, total in totals.items()}
    sliced = model.slice(observe=sums.observe)
    for done, part in enumerate(texts[finished:], finished + 1):
        model.hidden_states(part.input_ids, sliced, part.documents)
        if done < len(texts) and state.is_due(reduce):
            state.save_widths(done, *_over_all_processes(sums, reduce))
        if progress:
            progress("widths", done, len(texts))
    reduced, numbers = _over_all_processes(sums, reduce)
    if finished < len(texts):
        state.save_widths(len(texts), reduced, numbers)
    moment, finish = reduced.pop(RESIDUAL, None), AGGREGATE[aggregation][1]
    scores = {key: finish(total, numbers[key]) for key, total in reduced.items()}
    for key in [key for key in scores if key.startswith("mamba.")]:
        layer = key.removeprefix("mamba.")
        heads, channels = score_mamba(scores.pop(key))
        scores |= {f"mamba_heads.{layer}": heads, f"mamba_channels.{layer}": channels}
    return scores, moment


def _over_all_processes(
    sums: WidthSums, reduce: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The sums and counts over all processes, in CPU memory, by one message.

    One message works because keys come in the same order in all processes.
    """
    totals, counts = sums.totals, sums.counts
    numbers = torch.tensor(list(counts.values())).to(totals["hidden"])
    everything = reduce(torch.cat([*(total.flatten() for total in totals.values()), numbers]))
    *sums, numbers = everything.cpu().split([*(total.numel() for total in totals.values()), len(counts)])
    sums = {key: flat.view_as(totals[key]) for key, flat in zip(totals, sums, strict=True)}
    return sums, dict(zip(counts, numbers.tolist(), strict=True))


def mamba_sizes(units: dict[str, Units], key: str) -> list[int]:
    """[number of heads, number of channels per head] of a Mamba layer. `key`: "mamba." and the layer's number."""
    layer = key.removeprefix("mamba.")
    return [units[f"{axis}.{layer}"].size for axis in ("mamba_heads", "mamba_channels")]


def grams(weight: Tensor, num_units: int) -> Tensor:
    """W_uᵀW_u of each unit u: weight (hidden, units · size) → (units, size, size). W_u are the unit's columns.

    With it, the norm of an output costs size² products per unit and position, and not hidden · size.
    """
    columns = weight.T.unflatten(0, (num_units, -1))  # (units, size, hidden)
    found = [part @ part.mT for part in map(wide, parts_of(columns, 0))]
    return found[0] if len(found) == 1 else torch.cat(found)


def output_norms(inputs: Tensor, gram: Tensor) -> Tensor:
    """‖W_u x_u‖₂ of each unit u: the norm of what it adds to the layer's output.

    inputs (B, L, units · size), gram (units, size, size), see `grams` → (B, L, units). x_u are the `size` inputs of
    unit u.
    """
    inputs = wide(inputs).unflatten(-1, (len(gram), -1))  # (B, L, units, size)
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
