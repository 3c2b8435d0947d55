"""The most probable combinations within a budget, in a space with too many combinations to compare them one by one.

Once the sizes that hold for the whole model are given (a *frame*), the cost is a sum over the layers' own choices. To
find the most probable choices with a given sum is a knapsack problem, which dynamic programming solves. Costs are
rounded to bins for this, so every result is checked with its exact cost.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import torch
from torch import Tensor

from elastic_core.search.space import ElasticSpace

BINS = 2000  # the cost that may be saved below a frame's own is divided into so many steps
FRAMES_AT_ONCE = 16
CORRECTIONS = 8  # how often a result that is off the target by rounding is corrected before its frame is given up


def most_probable(
    space: ElasticSpace,
    log_probs: list[Tensor],
    target: float,
    bound: list[int],
    tolerance: float,
    depth: int | None = None,
) -> Iterator[list[int]]:
    """Combinations nested in `bound` with costs within `tolerance` of `target`, the most probable first.

    There is at most one for each frame: the most probable one of those that the frame allows. Of equally probable
    combinations, the one with the nearest cost comes first. With `depth`, all have this choice of depth. The other
    arguments are those of `selection.select`.
    """
    own = [i for i, slot in enumerate(space.slots) if sum(slot.axis == other.axis for other in space.slots) > 1]
    log_probs = [log_prob.double() for log_prob in log_probs]
    frames = _frames(space, bound, own, depth)
    smallest = frames.clone()
    smallest[:, own] = torch.tensor([len(space.slots[i].sizes) - 1 for i in own])
    largest_cost, smallest_cost = space.costs(torch.cat([frames, smallest])).view(2, -1)
    frames = frames[(largest_cost >= target * (1 - tolerance)) & (smallest_cost <= target * (1 + tolerance))]
    limits = torch.zeros(len(frames), dtype=torch.float64)  # no combination of the frame is more probable
    for i, log_prob in enumerate(log_probs):
        limits += log_prob[bound[i] :].max() if i in own else log_prob[frames[:, i]]
    order = limits.argsort(descending=True, stable=True)
    found: list[tuple[float, list[int]]] = []
    for part in order.split(FRAMES_AT_ONCE) if len(order) else ():
        while found and -found[0][0] >= limits[part[0]]:
            yield heapq.heappop(found)[1]
        for score, combination in _fill(space, log_probs, target, tolerance, frames[part], own):
            heapq.heappush(found, (-score, combination))
    while found:
        yield heapq.heappop(found)[1]


def _frames(space: ElasticSpace, bound: list[int], own: list[int], depth: int | None) -> Tensor:
    """All frames nested in `bound`, (frames, slots). The slots `own` of single layers have the index of the bound."""
    frames = torch.tensor([bound])
    for i, (low, end) in enumerate(zip(bound, space.num_servable, strict=True)):
        if i not in own:
            frames = frames.repeat_interleave(end - low, 0)
            frames[:, i] = torch.arange(low, end).repeat(len(frames) // (end - low))
    return frames if depth is None else frames[frames[:, -1] == depth]


def _fill(space, log_probs, target, tolerance, frames: Tensor, own: list[int]) -> list[tuple[float, list[int]]]:
    """For each of the `frames` (N, slots) that has one: (the score, the most probable combination within the budget).

    `own` are the slots of single layers. Their indices in `frames` are the lowest that are allowed.
    """
    choices = [torch.arange(int(frames[0, slot]), space.num_servable[slot]) for slot in own]
    moved = frames.repeat(1 + sum(map(len, choices)), 1, 1)  # the frames, and the frames with one slot changed
    for row, (slot, choice) in enumerate(((s, c) for s, cs in zip(own, choices, strict=True) for c in cs), start=1):
        moved[row, :, slot] = choice
    base, *costs = space.costs(moved.flatten(0, 1)).view(len(moved), -1).split([1, *map(len, choices)])
    width = ((base[0] - target * (1 - tolerance)) / BINS).clamp(min=1e-9 * target)  # cost of one bin, (N,)
    scores = torch.full((len(frames), BINS + 1), -torch.inf, dtype=torch.float64)  # of each sum of saved cost
    scores[:, 0] = 0
    history = []
    for slot, choice, cost in zip(own, choices, costs, strict=True):
        saved = ((base - cost) / width).round().clamp(0, BINS + 1).long()  # (choices, N)
        before = torch.arange(BINS + 1) - saved[..., None]  # (choices, N, bins)
        options = scores.expand(len(choice), -1, -1).gather(-1, before.clamp(min=0))
        options = options.masked_fill(before < 0, -torch.inf) + log_probs[slot][choice][:, None, None]
        scores, best = options.max(0)
        history.append((slot, choice, saved, best.to(torch.int16)))
    return _within_budget(space, log_probs, target, tolerance, frames, scores, base[0], width, history)


def _within_budget(space, log_probs, target, tolerance, frames, scores, base, width, history):
    """The result of `_fill`: of each frame, the most probable combination whose exact cost is within the budget.

    Where the cost is not exactly a sum, or by rounding, the exact cost of a result differs from that of its bin. The
    difference is assumed for all bins of the frame, and the next result is taken.
    """
    costs, goal, results = base[:, None] - width[:, None] * torch.arange(BINS + 1), tolerance, []
    left = torch.arange(len(frames))
    for _ in range(CORRECTIONS):
        deviation = (costs[left] / target - 1).abs()
        values = (scores[left] - 1e-3 * deviation).masked_fill(deviation > goal * (1 + 1e-9), -torch.inf)
        best, at = values.max(1)
        left, at = left[best > -torch.inf], at[best > -torch.inf]
        if not len(left):
            break
        found, place = frames[left], at.clone()
        for slot, choice, saved, chosen in reversed(history):
            number = chosen[left, place].long()
            found[:, slot], place = choice[number], place - saved[number, left]
        exact = space.costs(found)
        is_within = (exact / target - 1).abs() <= tolerance
        likelihood = sum(log_prob[found[:, slot]] for slot, log_prob in enumerate(log_probs))
        score = likelihood - 1e-3 * (exact / target - 1).abs()
        results += list(zip(score[is_within].tolist(), found[is_within].tolist(), strict=True))
        costs[left] += (exact - costs[left, at])[:, None]
        left, goal = left[~is_within], tolerance / 2
    return results
