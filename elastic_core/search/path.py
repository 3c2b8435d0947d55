"""The path: untrained submodels between neighbouring members of a family, for the budgets in between.

Every submodel of the path lies within the larger member and contains the smaller one, so it is nested with all members.
Two submodels of the path need not be nested in each other: one may have more layers, the other wider ones.

The costs between two members are divided into bins of about 1 %. For each bin, the path has the best balanced of the
possible submodels. It is the one that lies nearest to the straight line between the two members, with the logarithms of
all sizes as coordinates. So all axes shrink together, and none is at its smallest size while another is at its largest.

Sizes in between need not be in `choices`. They are multiples of the greatest common divisor of an axis' choices. If
these leave bins empty, finer multiples are tried, down to multiples of 8. If some cost is then still not within the
tolerance of a submodel, all sizes are tried (see `MULTIPLES`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elastic_core.cost.budgets import TOLERANCE
from elastic_core.cost.metrics import expected_cost
from elastic_core.model import architectures
from elastic_core.model.dims import elastic_keys, layer_of
from elastic_core.model.submodel import Submodel
from elastic_core.search.space import ElasticSpace, Slot

STEP = 0.01  # the width of a bin, as a share of the cost
MOST_BINS = 128  # between two members; for costs that differ by more than a factor of 3.6, bins are wider
MOST_CANDIDATES = 100_000  # Up to so many combinations of sizes are compared one by one.
# Sizes in between are multiples of the greatest common divisor of the choices (0), or, if these do not reach all costs,
# of its common divisors with 64 and 8, which kernels want, and with smaller numbers.
MULTIPLES = (0, 64, 8, 4, 2, 1)


@dataclass(frozen=True)
class Width:
    """One or more slots of an axis that have the same sizes in both members, so they have one size in between too.

    `keys`: their unit keys, or ``depth``. `sizes`: the possible sizes, from the larger member's to the smaller one's.
    `weight`: the share of the axis' slots. The weights of an axis add up to 1.
    """

    axis: str
    keys: tuple[str, ...]
    sizes: tuple[int, ...]
    weight: float

    @property
    def shrunk(self) -> Tensor:
        """For every size, the logarithm of the larger member's size divided by it: (sizes,) float64, ascending."""
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        return (sizes[0] / sizes).log()

    @property
    def steps(self) -> list[float]:
        """For every step to the next size, its position between the members, from 0 to 1: half-way on a log scale."""
        shrunk = (self.shrunk / self.shrunk[-1]).tolist()
        return [(before + after) / 2 for before, after in itertools.pairwise(shrunk)]


def path_between(space: ElasticSpace, family: list[list[int]]) -> list[Submodel]:
    """The submodels between neighbouring members of `family`, without the members, from the largest cost to the least.

    `family` has one combination per budget, each nested in the one before (see `selection.select_family`). The result
    covers the costs in the metric of the space: for every cost between two members, it has a submodel within the
    tolerance of budgets wherever some combination of sizes reaches it. There are at most about `MOST_BINS` between two
    members.

    If two axes make up the rows of one matrix (Mamba heads and channels), the combinations are those in which their
    sizes lie on one staircase, where both only shrink. So the rows of each submodel can be stored first, for all
    submodels in one order (export/nested.py).
    """
    return [submodel for pair in itertools.pairwise(family) for submodel in _between(space, *pair)]


def _between(space: ElasticSpace, larger: list[int], smaller: list[int]) -> list[Submodel]:
    """The path between two members, with the coarsest sizes that leave no bin empty, else with the best ones."""
    high, low = space.exact_cost(larger), space.exact_cost(smaller)
    if not high > low:
        return []
    best, tried = None, []
    for multiple in MULTIPLES:
        if multiple in (4, 2, 1) and (best[0][0] == 0 or architectures.has_experts(space.config)):
            break  # rows of experts have to be multiples of 8 (see EXPERT_ROW_MULTIPLE)
        widths = widths_between(space, larger, smaller, multiple)
        if widths in tried:
            continue
        tried.append(widths)
        indices = _candidates(space, widths)
        costs = _costs(space, widths, indices).numpy()
        chosen, num_empty = _choose(costs, _imbalance(widths, indices).numpy(), high, low)
        missing = _unserved(costs[chosen], high, low), num_empty
        if best is None or missing < best[0]:
            best = missing, [_submodel(space, widths, row) for row in indices[chosen].tolist()]
        if num_empty == 0:
            break
    members = {space.submodel(larger), space.submodel(smaller)}
    return [submodel for submodel in dict.fromkeys(best[1]) if submodel not in members]


def widths_between(space: ElasticSpace, larger: list[int], smaller: list[int], multiple: int) -> list[Width]:
    """All widths and, last, the depth, with their sizes between two members. `multiple`: see `MULTIPLES`."""
    grouped: dict[tuple, list[Slot]] = {}
    for slot, high, low in _ends(space, larger, smaller):
        grouped.setdefault((slot.axis, high, low), []).append(slot)
    num_slots = Counter(slot.axis for slot in space.slots)
    widths = []
    for (axis, high, low), slots in grouped.items():
        keys = tuple(key for slot in slots for key in slot.keys)
        sizes = tuple(range(high, low - 1, -_unit(space, slots[0], multiple)))
        widths.append(Width(axis, keys, sizes, len(slots) / num_slots[axis]))
    return widths


def _ends(space: ElasticSpace, larger: list[int], smaller: list[int]) -> Iterator[tuple[Slot, int, int]]:
    """Every slot with its sizes in the larger and the smaller member.

    A layer that a member drops has no size in it. If both drop it, its size does not change. If only the smaller one
    drops it and the sizes of the other layers are uniform in both members, it has their sizes, so it stays uniform.
    """
    ends = [(slot, slot.sizes[a], slot.sizes[b]) for slot, a, b in zip(space.slots, larger, smaller, strict=True)]
    in_larger, in_smaller = (set(space.depth_ranking[:depth]) for depth in ends[-1][1:])
    for _, of_axis in itertools.groupby(ends, lambda end: end[0].axis):
        slots = list(of_axis)
        lasting = {(high, low) for slot, high, low in slots if layer_of(slot.keys[0]) in in_smaller}
        for slot, high, low in slots:
            layer = layer_of(slot.keys[0])
            if len(slots) > 1 and layer not in in_larger:
                low = high
            elif len(slots) > 1 and layer not in in_smaller and len(lasting) == 1:
                (uniform,) = lasting
                low = uniform[1] if uniform[0] == high else low
            yield slot, high, low


def _unit(space: ElasticSpace, slot: Slot, multiple: int) -> int:
    """The difference of neighbouring sizes of a slot."""
    if slot.axis == "depth":
        return 1
    divisor = math.gcd(*slot.sizes)
    groups = space.units[slot.keys[0]].groups
    return math.lcm(math.gcd(divisor, multiple), groups)  # gcd(divisor, 0) is the divisor itself, a multiple of groups


def _candidates(space: ElasticSpace, widths: list[Width]) -> Tensor:
    """The combinations of sizes to choose from, as an index per width: (candidates, widths) int64.

    All combinations, if these are few; otherwise those near the line between the members.
    """
    sizes = [len(width.sizes) for width in widths]
    if math.prod(sizes) <= MOST_CANDIDATES:
        found = torch.cartesian_prod(*map(torch.arange, sizes)).view(-1, len(sizes))
    else:
        found = _near_line(widths)
    allowed = torch.ones(len(found), dtype=torch.bool)
    for (first, second), pairs in _allowed_pairs(space, widths).items():
        allowed &= pairs[found[:, first], found[:, second]]
    return found[allowed]


def _near_line(widths: list[Width]) -> Tensor:
    """Combinations near the line between the members, as an index per width: (candidates, widths) int64.

    Along the line, each step takes the next size of one width. In addition, one axis may be a step ahead or behind, so
    that fine axes make up for the large steps of a coarse one. Every combination comes with every depth.
    """
    steps = sorted((at, number) for number, width in enumerate(widths[:-1]) for at in width.steps)
    rows = torch.zeros(1 + len(steps), len(widths), dtype=torch.int64)
    rows[torch.arange(1, len(rows)), [number for _, number in steps]] = 1
    rows, most = rows.cumsum(0), torch.tensor([len(width.sizes) - 1 for width in widths])
    axes, depths = dict.fromkeys(width.axis for width in widths[:-1]), torch.arange(len(widths[-1].sizes))
    num_rows = max(1, MOST_CANDIDATES // (len(depths) * (1 + 2 * len(axes))))
    if len(rows) > num_rows:
        rows = rows[torch.linspace(0, len(rows) - 1, num_rows).long()]
    shifts = [torch.tensor([step * (width.axis == axis) for width in widths]) for axis in axes for step in (-1, 1)]
    rows = torch.cat([rows, *((rows + shift).clamp(min=0).minimum(most) for shift in shifts)])
    found = rows.repeat_interleave(len(depths), 0)
    found[:, -1] = depths.repeat(len(rows))
    return found


def _allowed_pairs(space: ElasticSpace, widths: list[Width]) -> dict[tuple[int, int], Tensor]:
    """For pairs of widths, which sizes are allowed together: a boolean table (sizes, sizes)."""
    place = {key: number for number, width in enumerate(widths) for key in width.keys}
    tables = {}
    for dims in architectures.parameter_layout(space.config).values():
        for keys in map(elastic_keys, dims):
            if len(keys) == 2:
                pair = tuple(sorted(place[key] for key in keys))
                if pair not in tables:
                    tables[pair] = staircase(*(widths[number] for number in pair))
    problem = functools.partial(architectures.of(space.config).size_problem, space.config)
    hidden = place["hidden"]
    for number, width in enumerate(widths):
        if width.axis == "attention_heads":
            fits = [[problem(size, heads) is None for heads in width.sizes] for size in widths[hidden].sizes]
            tables[hidden, number] = torch.tensor(fits)
    return tables


def staircase(first: Width, second: Width) -> Tensor:
    """A chain of pairs of sizes from the larger member's to the smaller one's: a boolean table (sizes, sizes).

    Each step takes the next size of one of the widths, in the order of the line between the members.
    """
    table = torch.zeros(len(first.sizes), len(second.sizes), dtype=torch.bool)
    at = [0, 0]
    table[0, 0] = True
    for _, number in sorted((at, number) for number, width in enumerate((first, second)) for at in width.steps):
        at[number] += 1
        table[at[0], at[1]] = True
    return table


def _costs(space: ElasticSpace, widths: list[Width], indices: Tensor) -> Tensor:
    """The costs of combinations (N, widths) in the metric of the space: (N,) float64."""
    columns = [torch.tensor(width.sizes)[column] for width, column in zip(widths, indices.T, strict=True)]
    sizes = {key: size.double() for width, size in zip(widths, columns, strict=True) for key in width.keys}
    position = torch.empty(len(space.depth_ranking), dtype=torch.int64)
    position[list(space.depth_ranking)] = torch.arange(len(position))
    keep = (position[:, None] < columns[-1]).double()  # (layers, N)
    return expected_cost(space.metric, space.config, sizes, keep)


def _imbalance(widths: list[Width], indices: Tensor) -> Tensor:
    """The squared distance of combinations (N, widths) from the line between the members: (N,) float64."""
    shrunk = torch.stack(
        [math.sqrt(w.weight) * w.shrunk[column] for w, column in zip(widths, indices.T, strict=True)], dim=1
    )
    line = torch.stack([math.sqrt(width.weight) * width.shrunk[-1] for width in widths])
    return shrunk.square().sum(1) - (shrunk @ line).square() / line.square().sum()


def _choose(costs: np.ndarray, imbalance: np.ndarray, high: float, low: float) -> tuple[list[int], int]:
    """The candidates of a path between the costs `high` and `low` of two members, and the number of empty bins.

    In each bin, the candidate with the least imbalance, then that nearest to the middle of the bin. Where the next one
    is too far away for a budget in between, also candidates that are nearer, as long as there are any. Largest first.
    """
    num_bins = min(MOST_BINS, math.ceil(math.log(high / low) / math.log1p(STEP)))
    place = np.log(high / costs) / math.log(high / low) * num_bins  # 0 is the larger member
    between = np.flatnonzero((costs > low) & (costs < high))
    bins = np.clip(np.floor(place[between]), 0, num_bins - 1)
    off_centre = np.abs(place[between] - bins - 0.5)
    order = between[np.lexsort((between, off_centre.round(6), imbalance[between].round(9), bins))]
    _, first = np.unique(np.sort(bins), return_index=True)
    chosen = order[first].tolist()  # Its costs fall, because bins are in the order of falling costs.
    chosen, num_empty = _fill_gaps(chosen, order, costs, high, low), num_bins - len(first)
    return chosen, num_empty


def _fill_gaps(chosen: list[int], order: np.ndarray, costs: np.ndarray, high: float, low: float) -> list[int]:
    """`chosen` with candidates of `order` added until every cost that some candidate serves is served."""
    done = False
    while not done:
        done = True
        ends = [high, *costs[chosen].tolist(), low]
        for number, (above, below) in enumerate(itertools.pairwise(ends)):
            if _unserved_between(above, below):
                inside = order[(costs[order] < above) & (costs[order] > below)]
                if len(inside):
                    middle = np.abs(np.log(costs[inside] ** 2 / (above * below)))
                    chosen.insert(number, int(inside[middle.argmin()]))
                    done = False
                    break
    return chosen


def _unserved_between(above: float, below: float) -> float:
    """How many of the costs between two costs are not within the tolerance of either, on a log scale; 0 for none."""
    return max(0.0, math.log(above / (1 + TOLERANCE)) - math.log(below / (1 - TOLERANCE)))


def _unserved(costs: np.ndarray, high: float, low: float) -> float:
    """How many costs between two members are not within the tolerance of any in `costs`, largest first (log scale)."""
    return sum(itertools.starmap(_unserved_between, itertools.pairwise([high, *costs.tolist(), low])))


def _submodel(space: ElasticSpace, widths: list[Width], indices: list[int]) -> Submodel:
    chosen = zip(widths, indices, strict=True)
    return space.submodel_of_sizes({key: width.sizes[i] for width, i in chosen for key in width.keys})
