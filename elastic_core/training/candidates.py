"""The final choice of the family: the router proposes candidates, and their measured KL to the teacher decides.

What the router believes depends on its seed and its learning rate. So for each budget, several combinations are
compared: each is run as a slice on text of the stage (forward passes only), and its KL to the teacher is measured. It
is a slice of the sorted parent, with the norm gains of its size. The trained weights would favour the sizes that the
router has preferred so far, which depend on its seed; and the best sizes of the parent also train best. The
best ones for the largest budget below 1.0 are the *beam*: candidates for the next budget are nested in one of them. The
family with the lowest sum of KL, weighted by the stage's budget shares, is chosen. The router's own family is always
measured on the whole text, so the chosen family is never worse than that.

To save work, all candidates are first measured on little text, and the worse half is dropped each time the text doubles
(successive halving).

The result depends only on the state of the run at this step. A run that is killed meanwhile does it again, with the
same result. All ranks run the same slices in the same order, each on its own part of the text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_core.cost.budgets import TOLERANCE
from elastic_core.data.loader import IGNORED_LABEL
from elastic_core.model import architectures
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.search.selection import combinations_with_room, propose, select_family
from elastic_core.training.distributed.placement import reshard
from elastic_core.training.losses import distillation_loss
from elastic_core.training.run import Run, precision

# The candidates left at the end are measured on as many microbatches as have so many tokens, but on 1 to 16.
TOKENS, MOST_PARTS = 32_768, 16
BEAM = 4  # So many families go on to the next budget.
ROUNDS = 4  # of halving
SMALLEST_WEIGHT = 1e-3  # of the KL of a budget that the stage does not train

Combination = tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """The combinations of the first budgets, the largest budget's first, and the weighted sum of their KL."""

    combinations: tuple[Combination, ...] = ()
    total: float = 0.0

    def extended(self, combination: Combination, weighted_kl: float) -> Family:
        """This family with the combination of one more budget."""
        return Family((*self.combinations, combination), self.total + weighted_kl)


class Measured:
    """The KL of a budget's candidates, summed over the tokens that each was measured on."""

    def __init__(self, candidates: list[Combination]):
        self.sums = dict.fromkeys(candidates, 0.0)
        self.tokens = dict.fromkeys(candidates, 0)

    def add(self, candidates: list[Combination], sums: list[float], tokens: int) -> None:
        for candidate, value in zip(candidates, sums, strict=True):
            self.sums[candidate] += value
            self.tokens[candidate] += tokens

    def mean(self, candidate: Combination) -> float:
        """The KL in nats per token; infinite where it is not a finite number."""
        mean = self.sums[candidate] / max(1, self.tokens[candidate])
        return mean if math.isfinite(mean) else math.inf

    def complete(self) -> set[Combination]:
        """The candidates that were measured on the whole text."""
        return {candidate for candidate, tokens in self.tokens.items() if tokens == max(self.tokens.values())}

    def rows(self) -> list[dict]:
        """One row per candidate, those with the most text first, of these those with the lowest KL."""
        order = sorted(self.sums, key=lambda candidate: (-self.tokens[candidate], self.mean(candidate), candidate))
        return [{"indices": list(c), "kl": _finite(self.mean(c)), "tokens": self.tokens[c]} for c in order]


def choose_family(run: Run) -> tuple[list[list[int]], dict | None]:
    """(the final combination of every budget, how it was chosen as JSON values, or None if nothing was measured).

    The second has `candidates`, for each budget below 1.0 the rows of `Measured`; and `chosen` and `router`, which are
    the chosen family and the router's own: `indices`, `kl` by budget, and `weighted_kl`. All ranks have to call this
    together.
    """
    own = [tuple(indices) for indices in select_family(run.router, run.routing.scales[1])]
    if run.routing.candidates == 1 or min(run.budgets.values()) == 1.0:
        return [list(indices) for indices in own], None
    allowed = combinations_with_room(run.router.space, run.router.targets, TOLERANCE)
    beam, router, measured = [Family()], Family(), {}
    for index, (budget, target) in enumerate(run.budgets.items()):
        if target == 1.0:
            beam, router = [Family((own[index],))], Family((own[index],))
            continue
        pairs = _candidates(run, index, beam, allowed[index])
        pairs += [pair for pair in [(router, own[index])] if pair not in pairs]
        weight, found = _weight(run, budget), _compare(run, budget, pairs, own[index])
        extended = {family.extended(c, weight * found.mean(c)) for family, c in pairs if c in found.complete()}
        router = router.extended(own[index], weight * found.mean(own[index]))
        beam = sorted(extended, key=lambda family: (family.total, family != router, family.combinations))[:BEAM]
        beam += [router] if router not in beam else []
        measured[budget] = found
    return [list(indices) for indices in beam[0].combinations], {
        "candidates": {budget: found.rows() for budget, found in measured.items()},
        "chosen": _described(run, beam[0], measured),
        "router": _described(run, router, measured),
    }


def _candidates(run: Run, index: int, beam: list[Family], allowed: Tensor | None) -> list[tuple[Family, Combination]]:
    """The candidates for budget `index`, each with the family that it extends."""
    space, count = run.router.space, run.routing.candidates
    if len(beam) > 1:  # Many candidates are nested in more than one family of the beam, and are measured once.
        count = math.ceil(count / 2)
    pairs = []
    for family in beam:
        bound = list(family.combinations[-1]) if family.combinations else [0] * len(space.slots)
        log_probs = run.router.log_probs(index, bound, run.routing.scales[1])
        target = run.router.targets[index] * run.parent_cost
        pairs += [(family, tuple(c)) for c in propose(space, log_probs, target, bound, count, allowed=allowed)]
    return pairs


def _compare(run: Run, budget: str, pairs: list[tuple[Family, Combination]], own: Combination) -> Measured:
    """Measure the candidates of a budget by successive halving. Those of the last round have the whole text.

    A candidate's score in a round is the total of the best family that it extends. `own` is never dropped.
    """
    left = list(dict.fromkeys(candidate for _, candidate in pairs))
    found, rounds = Measured(left), _rounds(run, len(left))
    total, done, weight = sum(len(parts) * count for parts, count in rounds), 0, _weight(run, budget)
    for parts, count in rounds:
        scores = dict.fromkeys(left, math.inf)
        for family, candidate in pairs if done else ():
            if candidate in scores:
                scores[candidate] = min(scores[candidate], family.total + weight * found.mean(candidate))
        left = sorted(left, key=lambda c: (c != own, scores[c], c))[:count]
        found.add(left, *_measure(run, left, parts, (f"candidates of {budget}", done, total)))
        done += len(parts) * count
    run.forget_slices()
    return found


def _rounds(run: Run, count: int) -> list[tuple[range, int]]:
    """The rounds of halving for `count` candidates: (parts of the text to add, number of candidates) of each.

    A part of the text is one microbatch.
    """
    stage = run.stage
    part_tokens = stage.batch_size // stage.microbatches * stage.sequence_length
    num_parts = min(MOST_PARTS, math.ceil(TOKENS / part_tokens))
    ends = sorted({math.ceil(num_parts / 2**i) for i in range(ROUNDS)})
    rounds, start = [], 0
    for end in ends:
        rounds.append((range(start, end), count))
        start, count = end, min(count, max(BEAM + 1, math.ceil(count / 2)))
    return rounds


@torch.no_grad()
def _measure(
    run: Run, candidates: list[Combination], parts: range, progress: tuple[str, int, int]
) -> tuple[list[float], int]:
    """(the sum of each candidate's KL over the tokens of these parts of the text, the number of tokens).

    `progress`: what is done, how many forward passes are done, and how many there will be.
    """
    model, device, space = run.frozen_teacher or run.model, run.ranks.device, run.router.space
    sliced_model = _model_to_slice(run)
    sums = torch.zeros(len(candidates) + 1, dtype=torch.float64, device=device)
    what, done, total = progress
    per_part = run.stage.batch_size // run.stage.microbatches
    with torch.compiler.set_stance("force_eager"), precision(run.stage, device):  # a slice is not worth a graph
        for part in parts:
            batch = run.batch(part * per_part, per_part).to(device)
            documents = run.documents(batch, batch.input_ids)
            full = run.slice_of(model)
            states = model.hidden_states(batch.input_ids, full, documents)
            teacher = states, model.head(full)  # Read after the forward pass: only then is a sharded head gathered.
            sums[-1] += (batch.labels != IGNORED_LABEL).sum()
            for number, candidate in enumerate(candidates):
                sliced = run.slice_of(sliced_model, space.submodel(list(candidate)))
                hidden = sliced_model.hidden_states(batch.input_ids, sliced, documents)
                head, one = sliced_model.head(sliced), torch.ones((), device=device)
                sums[number] += distillation_loss(hidden, head, batch.labels, teacher, num_labelled=one)[2]
                done += 1
                if run.progress is not None:
                    run.progress(what, done, total)
    for module in dict.fromkeys((sliced_model, model)):
        reshard(module)
    *values, tokens = run.ranks.sum(sums).tolist()
    return values, int(tokens)


def _model_to_slice(run: Run) -> ElasticModel:
    """The model whose slices are measured: the frozen parent, or the model itself if there is none of its shapes."""
    parent = run.frozen_teacher
    if parent is None or architectures.shapes(parent.config) != architectures.shapes(run.model.config):
        return run.model
    return parent


def _weight(run: Run, budget: str) -> float:
    """The weight of a budget's KL: its share of the stage's microbatches."""
    return max(SMALLEST_WEIGHT, run.shares.get(budget, 0.0) / sum(run.shares.values()))


def _described(run: Run, family: Family, measured: dict[str, Measured]) -> dict:
    """A family as JSON values."""
    combinations = dict(zip(run.budgets, family.combinations, strict=True))
    return {
        "indices": [list(indices) for indices in family.combinations],
        "kl": {budget: _finite(found.mean(combinations[budget])) for budget, found in measured.items()},
        "weighted_kl": _finite(family.total),
    }


def _finite(value: float) -> float | None:
    """`value`, or None for a number that JSON cannot write."""
    return value if math.isfinite(value) else None
