"""Choose a submodel for every budget from the router's distributions.

Each submodel meets its budget within a tolerance and is nested in the next larger one. The untrained submodels between
two budgets come from path.py.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_core.config import ConfigError
from elastic_core.cost.budgets import TOLERANCE
from elastic_core.model.submodel import Submodel
from elastic_core.search.knapsack import most_probable
from elastic_core.search.router import Router
from elastic_core.search.space import ElasticSpace

LARGEST_GRID = 100_000  # Up to so many combinations are compared one by one. Above, see knapsack.py.
ATTEMPTS = 100  # With many per-layer choices, at most so many combinations are tried before a family is given up.

LogProbs = Callable[[int, list[int]], list[Tensor]]


@dataclass(frozen=True)
class Member:
    """The submodel of one budget. `target` is the budget as a fraction of the parent's cost."""

    target: float
    submodel: Submodel


def check_reachable(space: ElasticSpace, budgets: dict[str, float], tolerance: float = TOLERANCE) -> None:
    """Raise ConfigError unless the space has nested submodels whose costs are within `tolerance` of all `budgets`.

    `budgets` maps names to fractions of the parent's cost. This check runs before any training.
    """
    costs = space.grid_costs()[..., : space.num_servable[-1]]
    full, order = costs.flatten()[0].item(), sorted(budgets.items(), key=lambda item: -item[1])
    for name, target in order:
        if not 0 < target <= 1:
            raise ConfigError(f"budgets.{name}: got {target}; allowed: a fraction of the parent in (0, 1]")
    num_reached = _num_reachable(space, tuple(target for _, target in order), tolerance)
    if num_reached < len(order):
        name, target = order[num_reached]
        nearest = costs.flatten()[(costs.flatten() - target * full).abs().argmin()].item()
        raise ConfigError(
            f"budgets.{name}: got {target:.6g} ({space.metric.text(target * full)}), which no combination of "
            f"`choices` nested in the larger budgets reaches within {tolerance:.0%}; allowed: "
            f"{costs.min().item() / full:.3f} to 1.0, nearest {nearest / full:.3f}{_excluded_depths(space)}; "
            "change budgets or choices"
        )


def _num_reachable(space: ElasticSpace, targets: tuple[float, ...], tolerance: float) -> int:
    """How many of the `targets`, from the first on, have nested combinations within `tolerance`."""
    if not _can_enumerate(space):
        return len(nested_family(space, targets, lambda *_: equal_log_probs(space), tolerance))
    full, reachable = space.exact_cost([0] * len(space.slots)), None
    for number, target in enumerate(targets):
        near = _near_target(space, target * full, tolerance)
        reachable = near if reachable is None else near & _nested_in(reachable)
        if not reachable.any():
            return number
    return len(targets)


def _excluded_depths(space: ElasticSpace) -> str:
    """The part of an error message that names the depths that no submodel may have."""
    depths = space.slots[-1].sizes[space.num_servable[-1] :]
    return f"; depths up to {depths[0]} are excluded: transformers has no cache for their layers" if depths else ""


def _can_enumerate(space: ElasticSpace) -> bool:
    """Whether all combinations can be compared: every axis has one choice, or there are few enough combinations."""
    num_combinations = math.prod(len(slot.sizes) for slot in space.slots)
    return len(space.slots) == len(space.axis_slots()) or num_combinations <= LARGEST_GRID


def _near_target(space: ElasticSpace, target: float, tolerance: float) -> Tensor:
    """Which combinations have a cost within `tolerance` of `target` and a depth that is allowed: a boolean grid.

    A grid has one dimension per slot; its index is a combination.
    """
    found = (space.grid_costs(space.slots) / target - 1).abs() <= tolerance
    found[..., space.num_servable[-1] :] = False
    return found


def _nested_in(chosen: Tensor) -> Tensor:
    """Which combinations are nested in at least one of the `chosen` ones: every index is at least as high (grids)."""
    for dim in range(chosen.dim()):
        chosen = chosen.byte().cummax(dim).values.bool()
    return chosen


def combinations_with_room(space: ElasticSpace, targets: tuple[float, ...], tolerance: float) -> list[Tensor | None]:
    """For each target, a grid of the combinations that meet it and leave room for all smaller targets.

    A combination leaves room if, for every smaller target, some combination nested in it meets that target. Without
    this condition, the choice for a large budget could make a smaller budget impossible: for memory, costs have large
    gaps, because each layer's cache is kept or dropped as a whole.

    `targets` are fractions of the parent's cost, largest first. An entry is None if there are too many combinations to
    compare, or if no combination is left.
    """
    if not _can_enumerate(space):
        return [None] * len(targets)
    found, dims = [], tuple(range(len(space.slots)))
    for target in reversed(targets):
        near = _near_target(space, target * space.exact_cost([0] * len(space.slots)), tolerance)
        if found:  # Flipped, `_nested_in` gives the combinations that contain one of the smaller target's.
            near &= _nested_in(found[-1].flip(dims)).flip(dims)
        found.append(near)
    return [near if near.any() else None for near in reversed(found)]


def select(
    space: ElasticSpace,
    log_probs: list[Tensor],
    target: float,
    bound: list[int],
    tolerance: float,
    allowed: Tensor | None = None,
) -> list[int] | None:
    """The most probable combination that is nested in `bound` and has a cost within `tolerance` of `target`.

    - `log_probs`: one vector (choices,) per slot.
    - `target`: in the unit of the space's metric.
    - `bound`: the combination of the next larger budget.
    - `allowed`: a grid (see `combinations_with_room`) of the combinations to choose from, or None for all.

    If all combinations can be compared, the result is exact. With many per-layer choices, it is exact up to rounding
    of the costs (knapsack.py), and `allowed` is ignored. Returns None if nothing is found.
    """
    if _can_enumerate(space):
        return _select_on_grid(space, log_probs, target, bound, tolerance, allowed)
    return next(most_probable(space, log_probs, target, bound, tolerance), None)


def _select_on_grid(space, log_probs, target, bound, tolerance, allowed) -> list[int] | None:
    """`select` by comparing all combinations that are nested in `bound`."""
    corner, scores = _grid_scores(space, log_probs, target, bound, tolerance, allowed)
    best = int(scores.argmax())
    if scores.flatten()[best] == -torch.inf:
        return None
    place = torch.unravel_index(torch.tensor(best), scores.shape)
    return [int(i) + part.start for i, part in zip(place, corner, strict=True)]


def _grid_scores(space, log_probs, target, bound, tolerance, allowed) -> tuple[tuple[slice, ...], Tensor]:
    """(the part of the grid that is nested in `bound`, the score of each combination in it).

    The score is the log-probability. It is −inf for a combination that is not within the budget or not allowed.
    """
    corner = tuple(itertools.starmap(slice, zip(bound, space.num_servable, strict=True)))
    costs = space.grid_costs(space.slots)[corner]
    scores = torch.zeros((), dtype=torch.float64)
    for log_prob, low, end in zip(log_probs, bound, space.num_servable, strict=True):
        scores = scores[..., None] + log_prob[low:end].double()
    deviation = (costs / target - 1).abs()
    # Before training, all combinations are equally probable. Then the one with the nearest cost wins.
    scores = (scores - 1e-3 * deviation).masked_fill(deviation > tolerance, -torch.inf)
    if allowed is not None:
        scores = scores.masked_fill(~allowed[corner], -torch.inf)
    return corner, scores


def nested_family(
    space: ElasticSpace, targets: tuple[float, ...], log_probs: LogProbs, tolerance: float = TOLERANCE
) -> list[list[int]]:
    """The most probable combination for each of the `targets`, each nested in the one before.

    - `targets`: fractions of the parent's cost, largest first. 1.0 is the parent itself.
    - `log_probs(index, bound)`: the log-probabilities of target `index`, if `bound` is the next larger combination.

    If a combination leaves no room for the smaller targets, the next most probable one is tried. If not all targets can
    be met, the result has only the combinations of the first ones.
    """
    full = space.exact_cost([0] * len(space.slots))
    allowed = combinations_with_room(space, targets, tolerance)
    attempts_left = ATTEMPTS

    def complete(family: list[list[int]]) -> list[list[int]]:
        nonlocal attempts_left
        longest, index = family, len(family)
        if index == len(targets):
            return family
        bound = family[-1] if family else [0] * len(space.slots)
        for found in _options(space, log_probs, targets[index] * full, index, bound, tolerance, allowed[index]):
            longest = max(longest, complete([*family, found]), key=len)
            attempts_left -= 1
            if len(longest) == len(targets) or attempts_left <= 0:
                break
        return longest

    return complete([])


def _options(space, log_probs, target, index, bound, tolerance, allowed) -> Iterator[list[int]]:
    """The combinations for one target that `nested_family` tries, the most probable first."""
    if target == space.exact_cost([0] * len(space.slots)):
        yield [0] * len(space.slots)
    elif _can_enumerate(space):  # `allowed` leaves room for all smaller targets, so no second one is needed
        found = _select_on_grid(space, log_probs(index, bound), target, bound, tolerance, allowed)
        if found is not None:
            yield found
    else:
        found, place = log_probs(index, bound), (target, bound, tolerance)
        yield from itertools.islice(most_probable(space, found, *place), 1)
        # For memory, most depends on how many layers keep a cache. So first try the best combination of every depth.
        for depth in range(bound[-1], space.num_servable[-1]):
            yield from itertools.islice(most_probable(space, found, *place, depth), 1)
        yield from itertools.islice(most_probable(space, found, *place), 1, None)


def equal_log_probs(space: ElasticSpace) -> list[Tensor]:
    """The log-probabilities, up to a constant, of a distribution in which all choices are equally probable."""
    return [torch.zeros(len(slot.sizes)) for slot in space.slots]


def select_family(router: Router, scale: float = 1.0, tolerance: float = TOLERANCE) -> list[list[int]]:
    """The final combination of every budget: the router's most probable one that meets the budget and is nested.

    `scale` is the logit scale s (eq. 9), `tolerance` the allowed relative deviation from the budget. Where
    `check_reachable` finds a family, this finds one: at the worst, the same. Raises ConfigError if no combination meets
    a budget.
    """
    space, targets = router.space, router.targets
    family = nested_family(space, targets, lambda *place: router.log_probs(*place, scale), tolerance)
    if len(family) < len(targets):
        family = nested_family(space, targets, lambda *_: equal_log_probs(space), tolerance)
    if len(family) < len(targets):
        raise ConfigError(
            f"budgets: no submodel nested in the next larger one is within {tolerance:.0%} of "
            f"{targets[len(family)]:.6g} of the parent's cost; add sizes to choices"
        )
    return family


def propose(
    space: ElasticSpace,
    log_probs: list[Tensor],
    target: float,
    bound: list[int],
    count: int,
    tolerance: float = TOLERANCE,
    allowed: Tensor | None = None,
) -> list[list[int]]:
    """Up to `count` different combinations that are nested in `bound` and have a cost within `tolerance` of `target`.

    Half of them are the most probable ones, the other half are spread over all that are possible (with many per-layer
    choices: over some that are probable), so that they do not depend on what the router believes. If there are not
    more than `count`, they are all returned. The arguments are those of `select`.
    """
    if _can_enumerate(space):
        corner, scores = _grid_scores(space, log_probs, target, bound, tolerance, allowed)
        order = scores.flatten().argsort(descending=True, stable=True)[: int((scores > -torch.inf).sum())]
        rows = torch.stack(torch.unravel_index(order, scores.shape), 1) + torch.tensor([part.start for part in corner])
    else:
        found = list(itertools.islice(most_probable(space, log_probs, target, bound, tolerance), 4 * count))
        rows = torch.tensor(found, dtype=torch.int64).view(-1, len(space.slots))
    if len(rows) <= count:
        return rows.tolist()
    chosen = _spread(space, rows, count // 2)
    chosen += [row for row in range(len(rows)) if row not in set(chosen)][: count - len(chosen)]
    return rows[sorted(chosen)].tolist()


def _spread(space: ElasticSpace, rows: Tensor, count: int) -> list[int]:
    """Row numbers of `count` of the combinations `rows` (N, slots): the most central one, then always the farthest.

    A distance is the sum over axes of the mean difference of indices, relative to the number of the axis's choices.
    """
    axes = [slot.axis for slot in space.slots]
    weights = [1 / max(1, len(slot.sizes) - 1) / axes.count(slot.axis) for slot in space.slots]
    points = rows.double() * torch.tensor(weights, dtype=torch.float64)
    chosen: list[int] = []
    nearest = (points - points.mean(0)).abs().sum(1).neg()
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        distance = (points - points[chosen[-1]]).abs().sum(1)
        nearest = distance if len(chosen) == 1 else torch.minimum(nearest, distance)
    return chosen
