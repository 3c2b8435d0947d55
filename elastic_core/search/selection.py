"""From the router's distribution to submodels: within their budgets, nested, and everything in between."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_core.config import ConfigError
from elastic_core.cost.budgets import TOLERANCE
from elastic_core.model.submodel import Submodel
from elastic_core.search.router import Router
from elastic_core.search.space import ElasticSpace

LARGEST_GRID = 100_000  # combinations that are all looked at


@dataclass(frozen=True)
class Member:
    """One budget of the family: its target as a fraction of the parent's cost, and its submodel."""

    target: float
    submodel: Submodel


def check_budgets(space: ElasticSpace, budgets: dict[str, float], tolerance: float = TOLERANCE) -> None:
    """Raise ConfigError, before any training, unless nested submodels can come within `tolerance` of every budget."""
    costs = space.grid_costs()[..., : space.ends[-1]]
    full = costs.flatten()[0].item()
    uniform = [torch.zeros(len(slot.sizes)) for slot in space.slots]
    bound, inside = [0] * len(space.slots), None
    for name, target in sorted(budgets.items(), key=lambda item: -item[1]):
        if not 0 < target <= 1:
            raise ConfigError(f"budgets.{name}: got {target}; allowed: a fraction of the parent in (0, 1]")
        if _can_be_looked_through(space):
            here = _within(space, target * full, tolerance)
            inside = here if inside is None else here & _smaller(inside)
            found = bool(inside.any())
        else:
            bound = select(space, uniform, target * full, bound, tolerance)
            found = bound is not None
        if not found:
            nearest = costs.flatten()[(costs.flatten() - target * full).abs().argmin()].item()
            raise ConfigError(
                f"budgets.{name}: got {target:.6g} ({space.metric.text(target * full)}), which no combination of "
                f"`choices` that is nested in the larger budgets reaches within {tolerance:.0%}; the choices give "
                f"{costs.min().item() / full:.3f} to 1.0, nearest {nearest / full:.3f}{_without_cache(space)}; "
                "change budgets or choices"
            )


def _without_cache(space: ElasticSpace) -> str:
    """Which depths are left out, in words."""
    depths = space.slots[-1].sizes[space.ends[-1] :]
    return f"; depth {depths[0]} and below keep no layer with which transformers has a cache" if depths else ""


def _can_be_looked_through(space: ElasticSpace) -> bool:
    """Whether every axis chooses once, or the combinations are few enough to look at all of them."""
    num_combinations = math.prod(len(slot.sizes) for slot in space.slots)
    return len(space.slots) == len(space.axis_slots()) or num_combinations <= LARGEST_GRID


def _within(space: ElasticSpace, target: float, tolerance: float) -> Tensor:
    """Which combinations cost `target` and can be served, a dimension per slot."""
    found = (space.grid_costs(space.slots) / target - 1).abs() <= tolerance
    found[..., space.ends[-1] :] = False
    return found


def _smaller(chosen: Tensor) -> Tensor:
    """Which combinations are nested in one of the `chosen` ones: no index is lower than there."""
    for dim in range(chosen.dim()):
        chosen = chosen.byte().cummax(dim).values.bool()
    return chosen


def with_smaller_ones(space: ElasticSpace, targets: tuple[float, ...], tolerance: float) -> list[Tensor | None]:
    """For each target, the combinations that meet it and have inside of them some for all smaller targets.

    What is cheapest to look at first may leave nothing for the rest: memory comes in lumps as large as a layer's cache.
    None where there are too many combinations, or none is left.
    """
    if not _can_be_looked_through(space):
        return [None] * len(targets)
    found, dims = [], tuple(range(len(space.slots)))
    for target in reversed(targets):
        here = _within(space, target * space.exact_cost([0] * len(space.slots)), tolerance)
        if found:
            here &= _smaller(found[-1].flip(dims)).flip(dims)  # nested the other way round: those around the smaller
        found.append(here)
    return [here if here.any() else None for here in reversed(found)]


def select(
    space: ElasticSpace,
    log_probs: list[Tensor],
    target: float,
    bound: list[int],
    tolerance: float,
    allowed: Tensor | None = None,
) -> list[int] | None:
    """The most probable combination whose cost is within `tolerance` of `target`, nested in the combination `bound`.

    Exact, and one of those `allowed`, where all combinations can be looked at; with many per-layer choices a descent
    from the most probable one. None where nothing is found.
    """
    if _can_be_looked_through(space):
        return _select_on_grid(space, log_probs, target, bound, tolerance, allowed)
    return _select_by_descent(space, log_probs, target, bound, tolerance)


def _select_on_grid(space, log_probs, target, bound, tolerance, allowed) -> list[int] | None:
    corner = tuple(itertools.starmap(slice, zip(bound, space.ends, strict=True)))
    costs = space.grid_costs(space.slots)[corner]
    scores = torch.zeros((), dtype=torch.float64)
    for log_prob, low, end in zip(log_probs, bound, space.ends, strict=True):
        scores = scores[..., None] + log_prob[low:end].double()
    deviation = (costs / target - 1).abs()
    # Among equally probable combinations (as before training) the nearest one.
    scores = (scores - 1e-3 * deviation).masked_fill(deviation > tolerance, -torch.inf)
    if allowed is not None:
        scores = scores.masked_fill(~allowed[corner], -torch.inf)
    best = int(scores.argmax())
    if scores.flatten()[best] == -torch.inf:
        return None
    return [int(i) + low for i, low in zip(torch.unravel_index(torch.tensor(best), scores.shape), bound, strict=True)]


def _select_by_descent(space, log_probs, target, bound, tolerance) -> list[int] | None:
    """From the most probable combination; where that ends in a dead end, from the largest or the smallest allowed."""
    moves = torch.tensor([(slot, i) for slot, low in enumerate(bound) for i in range(low, space.ends[slot])])
    pairs = moves[torch.combinations(torch.arange(len(moves)))]  # (pairs, 2, 2): two moves, each a slot and an index
    pairs = pairs[pairs[:, 0, 0] != pairs[:, 1, 0]]
    table = torch.nn.utils.rnn.pad_sequence([z.double() for z in log_probs], batch_first=True)  # (slots, choices)
    probable = [max(int(z[:end].argmax()), low) for z, low, end in zip(log_probs, bound, space.ends, strict=True)]
    for start in (probable, bound, [end - 1 for end in space.ends]):
        found = _descend(space, table, target, torch.tensor(start), (moves[:, None], pairs), tolerance)
        if found is not None:
            return found.tolist()
    return None


def _descend(space, table, target, indices, neighbourhoods, tolerance) -> Tensor | None:
    """Steps towards the target, each the one that loses the least probability per parameter of deviation it mends.

    A step moves one slot, or two where no single move helps (one down and another back up, for instance).
    """
    while (space.costs(indices[None]) - target).abs() > tolerance * target:
        found = (_best_step(space, table, target, indices, steps) for steps in neighbourhoods)
        indices = next((moved for moved in found if moved is not None), None)
        if indices is None:
            return None
    return indices


def _best_step(space, table, target, indices, steps) -> Tensor | None:
    """`indices` (slots,) after the best of `steps` (N, moves, 2); None where none comes nearer to the target."""
    moved = indices.repeat(len(steps), 1).scatter(1, steps[..., 0], steps[..., 1])  # (N, slots)
    remaining = (space.costs(moved) - target).abs()
    mended = (space.costs(indices[None]) - target).abs() - remaining
    slots = torch.arange(len(indices))
    lost = (table[slots, indices] - table[slots, moved]).sum(-1).clamp(min=0)
    price = (lost / mended).masked_fill(mended <= 0, torch.inf)
    if price.min() == torch.inf:
        return None
    return moved[remaining.masked_fill(price > price.min(), torch.inf).argmin()]


def select_family(router: Router, scale: float = 1.0, tolerance: float = TOLERANCE) -> list[list[int]]:
    """Choice indices of every budget: the router's most probable ones that are nested and within tolerance."""
    space, bound, family = router.space, [0] * len(router.space.slots), []
    full, allowed = space.exact_cost(bound), with_smaller_ones(space, router.targets, tolerance)
    with torch.no_grad():
        for index, target in enumerate(router.targets):
            if target < 1.0:
                log_probs = [prob.clamp(min=1e-30).log() for prob in router.probs(index, scale=scale)]
                found = select(space, log_probs, target * full, bound, tolerance, allowed[index])
                if found is None:
                    raise ConfigError(
                        f"budgets: no submodel inside the next larger one is within {tolerance:.0%} of {target:.6g}; "
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
