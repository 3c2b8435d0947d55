"""Choose a submodel for every budget from the router's distributions.

Each submodel meets its budget within a tolerance and is nested in the next larger one. The untrained submodels between
two budgets come from path.py.
"""

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

LARGEST_GRID = 100_000  # Up to so many combinations are compared one by one. Above, the search is approximate.


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
    full = costs.flatten()[0].item()
    uniform = [torch.zeros(len(slot.sizes)) for slot in space.slots]
    bound, reachable = [0] * len(space.slots), None
    for name, target in sorted(budgets.items(), key=lambda item: -item[1]):
        if not 0 < target <= 1:
            raise ConfigError(f"budgets.{name}: got {target}; allowed: a fraction of the parent in (0, 1]")
        if _can_enumerate(space):
            near = _near_target(space, target * full, tolerance)
            reachable = near if reachable is None else near & _nested_in(reachable)
            found = bool(reachable.any())
        else:
            bound = select(space, uniform, target * full, bound, tolerance)
            found = bound is not None
        if not found:
            nearest = costs.flatten()[(costs.flatten() - target * full).abs().argmin()].item()
            raise ConfigError(
                f"budgets.{name}: got {target:.6g} ({space.metric.text(target * full)}), which no combination of "
                f"`choices` nested in the larger budgets reaches within {tolerance:.0%}; allowed: "
                f"{costs.min().item() / full:.3f} to 1.0, nearest {nearest / full:.3f}{_excluded_depths(space)}; "
                "change budgets or choices"
            )


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

    If all combinations can be compared, the result is exact. With many per-layer choices, a local search starts at the
    most probable combination and ignores `allowed`. Returns None if nothing is found.
    """
    if _can_enumerate(space):
        return _select_on_grid(space, log_probs, target, bound, tolerance, allowed)
    return _select_by_descent(space, log_probs, target, bound, tolerance)


def _select_on_grid(space, log_probs, target, bound, tolerance, allowed) -> list[int] | None:
    """`select` by comparing all combinations that are nested in `bound`."""
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
    best = int(scores.argmax())
    if scores.flatten()[best] == -torch.inf:
        return None
    return [int(i) + low for i, low in zip(torch.unravel_index(torch.tensor(best), scores.shape), bound, strict=True)]


def _select_by_descent(space, log_probs, target, bound, tolerance) -> list[int] | None:
    """`select` by local search, from three starts in turn: the most probable, the largest and the smallest combination.

    The first start that reaches the target gives the result.
    """
    moves = torch.tensor([(slot, i) for slot, low in enumerate(bound) for i in range(low, space.num_servable[slot])])
    # A move is (slot, new choice index). moves: (moves, 2); pairs: (pairs, 2, 2), two moves of different slots.
    pairs = moves[torch.combinations(torch.arange(len(moves)))]
    pairs = pairs[pairs[:, 0, 0] != pairs[:, 1, 0]]
    table = torch.nn.utils.rnn.pad_sequence([z.double() for z in log_probs], batch_first=True)  # (slots, choices)
    probable = [
        max(int(z[:end].argmax()), low) for z, low, end in zip(log_probs, bound, space.num_servable, strict=True)
    ]
    for start in (probable, bound, [end - 1 for end in space.num_servable]):
        found = _descend(space, table, target, torch.tensor(start), (moves[:, None], pairs), tolerance)
        if found is not None:
            return found.tolist()
    return None


def _descend(space, table, target, indices, step_kinds, tolerance) -> Tensor | None:
    """Move `indices` (slots,) step by step towards the target. Returns None where no step comes nearer to it.

    Each step is the one that loses the least log-probability per unit of cost by which it comes nearer. A step changes
    one slot. If no such step comes nearer, it changes two slots: for instance, one gets smaller and another larger.
    """
    while (space.costs(indices[None]) - target).abs() > tolerance * target:
        found = (_best_step(space, table, target, indices, steps) for steps in step_kinds)
        indices = next((moved for moved in found if moved is not None), None)
        if indices is None:
            return None
    return indices


def _best_step(space, table, target, indices, steps) -> Tensor | None:
    """`indices` (slots,) after the best of `steps` (N, moves, 2), or None if no step comes nearer to the target."""
    moved = indices.repeat(len(steps), 1).scatter(1, steps[..., 0], steps[..., 1])  # (N, slots)
    remaining = (space.costs(moved) - target).abs()
    gained = (space.costs(indices[None]) - target).abs() - remaining
    slots = torch.arange(len(indices))
    lost = (table[slots, indices] - table[slots, moved]).sum(-1).clamp(min=0)
    price = (lost / gained).masked_fill(gained <= 0, torch.inf)
    if price.min() == torch.inf:
        return None
    return moved[remaining.masked_fill(price > price.min(), torch.inf).argmin()]


def select_family(router: Router, scale: float = 1.0, tolerance: float = TOLERANCE) -> list[list[int]]:
    """The final combination of every budget: the router's most probable one that meets the budget and is nested.

    `scale` is the logit scale s (eq. 9), `tolerance` the allowed relative deviation from the budget. Raises ConfigError
    if no combination meets a budget.
    """
    space, bound, family = router.space, [0] * len(router.space.slots), []
    full, allowed = space.exact_cost(bound), combinations_with_room(space, router.targets, tolerance)
    with torch.no_grad():
        for index, target in enumerate(router.targets):
            if target < 1.0:
                log_probs = [prob.clamp(min=1e-30).log() for prob in router.probs(index, scale=scale)]
                found = select(space, log_probs, target * full, bound, tolerance, allowed[index])
                if found is None:
                    raise ConfigError(
                        f"budgets: no submodel nested in the next larger one is within {tolerance:.0%} of "
                        f"{target:.6g} of the parent's cost; add sizes to choices"
                    )
                bound = found
            family.append(bound)
    return family
