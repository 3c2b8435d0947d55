"""From the router's distribution to submodels: within their budgets, nested, and everything in between."""

import itertools

import torch
from torch import Tensor

from elastic_core.choices import ElasticSpace
from elastic_core.config import ConfigError
from elastic_core.elastic_checkpoint import TOLERANCE
from elastic_core.router import Router
from elastic_core.submodel import Submodel


def check_budgets(space: ElasticSpace, budgets: dict[str, float], tolerance: float = TOLERANCE) -> None:
    """Raise ConfigError, before any training, unless nested submodels can come within `tolerance` of every budget."""
    costs = space.grid_costs()
    full = costs.flatten()[0].item()
    uniform = [torch.zeros(len(slot.sizes)) for slot in space.slots]
    bound = [0] * len(space.slots)
    for name, target in sorted(budgets.items(), key=lambda item: -item[1]):
        if not 0 < target <= 1:
            raise ConfigError(f"budgets.{name}: got {target}; allowed: a fraction of the parent in (0, 1]")
        found = select(space, uniform, target * full, bound, tolerance)
        if found is None:
            nearest = costs.flatten()[(costs.flatten() - target * full).abs().argmin()].item()
            raise ConfigError(
                f"budgets.{name}: got {target} ({target * full:,.0f} parameters), which no combination of `choices` "
                f"that is nested in the larger budgets reaches within {tolerance:.0%}; the choices give "
                f"{costs.min().item() / full:.3f} to 1.0, nearest {nearest / full:.3f}; change budgets or choices"
            )
        bound = found


def select(
    space: ElasticSpace, log_probs: list[Tensor], target: float, bound: list[int], tolerance: float
) -> list[int] | None:
    """The most probable combination whose cost is within `tolerance` of `target`, nested in the combination `bound`.

    Exact over the grid where every axis chooses once; with per-layer choices a descent from the most probable one.
    None where nothing is found.
    """
    if len(space.slots) == len(space.axis_slots()):
        return _select_on_grid(space, log_probs, target, bound, tolerance)
    return _select_by_descent(space, log_probs, target, bound, tolerance)


def _select_on_grid(space, log_probs, target, bound, tolerance) -> list[int] | None:
    corner = tuple(slice(low, None) for low in bound)
    costs = space.grid_costs()[corner]
    scores = torch.zeros((), dtype=torch.float64)
    for log_prob, low in zip(log_probs, bound, strict=True):
        scores = scores[..., None] + log_prob[low:].double()
    deviation = (costs / target - 1).abs()
    # Among equally probable combinations (as before training) the nearest one.
    scores = (scores - 1e-3 * deviation).masked_fill(deviation > tolerance, -torch.inf)
    best = int(scores.argmax())
    if scores.flatten()[best] == -torch.inf:
        return None
    return [int(i) + low for i, low in zip(torch.unravel_index(torch.tensor(best), scores.shape), bound, strict=True)]


def _select_by_descent(space, log_probs, target, bound, tolerance) -> list[int] | None:
    """Single moves, each the one that loses the least probability per parameter of deviation it mends."""
    indices = [max(int(z.argmax()), low) for z, low in zip(log_probs, bound, strict=True)]
    deviation = abs(space.num_parameters(indices) - target)
    while deviation > tolerance * target:
        best = None
        for slot, (now, low) in enumerate(zip(indices, bound, strict=True)):
            for index in range(low, len(space.slots[slot].sizes)):
                moved = [*indices[:slot], index, *indices[slot + 1 :]]
                remaining = abs(space.num_parameters(moved) - target)
                if remaining >= deviation:
                    continue
                loss = float(log_probs[slot][now] - log_probs[slot][index])
                key = (max(loss, 0.0) / (deviation - remaining), remaining)
                if best is None or key < best[0]:
                    best = (key, moved, remaining)
        if best is None:
            return None
        _, indices, deviation = best
    return indices


def select_family(router: Router, scale: float = 1.0, tolerance: float = TOLERANCE) -> list[list[int]]:
    """Choice indices of every budget: the router's most probable ones that are nested and within tolerance."""
    space, bound, family = router.space, [0] * len(router.space.slots), []
    full = space.num_parameters(bound)
    with torch.no_grad():
        for index, target in enumerate(router.targets):
            if target < 1.0:
                log_probs = [prob.clamp(min=1e-30).log() for prob in router.probs(index, scale=scale)]
                found = select(space, log_probs, target * full, bound, tolerance)
                if found is None:
                    raise ConfigError(
                        f"budgets: no submodel inside the next larger one is within {tolerance:.0%} of {target}; "
                        "give `choices` finer steps"
                    )
                bound = found
            family.append(bound)
    return family


def path_between(router: Router, family: list[list[int]], points: int = 64) -> list[Submodel]:
    """Nested submodels between neighbouring budgets of `family`, largest first, for budgets that were not trained.

    The budget's one-hots are interpolated; a slot steps when its expected index (which the pinned full budget mixes
    linearly) passes the next choice, one step at a time and never back.
    """
    path = []
    for index, (larger, smaller) in enumerate(itertools.pairwise(family)):
        now = list(larger)
        for point in range(1, points + 1):
            wanted = _interpolate(router, index, point / points)
            for slot, (low, high) in enumerate(zip(larger, smaller, strict=True)):
                goal = high if point == points else min(max(wanted[slot], low), high)
                while now[slot] < goal:
                    now[slot] += 1
                    path.append(router.space.submodel(now))
    return path


def _interpolate(router: Router, index: int, weight: float) -> list[int]:
    """Rounded expected choice indices at (1 − weight) of budget `index` and weight of the next smaller one."""
    budget = torch.zeros(len(router.targets))
    budget[index], budget[index + 1] = 1 - weight, weight
    pinned = router.targets[index] == 1.0
    with torch.no_grad():
        if pinned:
            probs = [weight * prob for prob in router.probs(index + 1)]
        else:
            probs = [logits.softmax(-1) for logits in router.logits(budget)]
        return [round((prob @ torch.arange(float(len(prob)))).item()) for prob in probs]
