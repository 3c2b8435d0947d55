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
    space: ElasticSpace, log_probs: list[Tensor], target: float, bound: list[int], tolerance: float
) -> Iterator[list[int]]:
    """Combinations nested in `bound` with costs within `tolerance` of `target`, the most probable first.

    There is at most one for each frame: the most probable one of those that the frame allows. The arguments are those
    of `selection.select`. Of equally probable combinations, the one with the nearest cost comes first.
    """
    own = [i for i, slot in enumerate(space.slots) if sum(slot.axis == other.axis for other in space.slots) > 1]
    frames = torch.tensor([bound])
    for i, (low, end) in enumerate(zip(bound, space.num_servable, strict=True)):
        if i not in own:
            frames = frames.repeat_interleave(end - low, 0)
            frames[:, i] = torch.arange(low, end).repeat(len(frames) // (end - low))
    smallest = frames.clone()
    smallest[:, own] = torch.tensor([len(space.slots[i].sizes) - 1 for i in own])
    frames = frames[
        (space.costs(frames) >= target * (1 - tolerance)) & (space.costs(smallest) <= target * (1 + tolerance))
    ]
    limits = frames.new_zeros(len(frames), dtype=torch.float64)  # no combination of the frame is more probable
    for i, log_prob in enumerate(log_probs):
        limits += log_prob[bound[i] :].double().max() if i in own else log_prob.double()[frames[:, i]]
    order = limits.argsort(descending=True, stable=True)
    found: list[tuple[float, int, list[int]]] = []
    for part in order.split(FRAMES_AT_ONCE) if len(order) else ():
        while found and -found[0][0] >= limits[part[0]]:
            yield heapq.heappop(found)[2]
        for number, combination in zip(
            part.tolist(), _fill(space, log_probs, target, tolerance, frames[part], own), strict=True
        ):
            if combination is not None:
                deviation = abs(space.exact_cost(combination) / target - 1)
                score = sum(z[i].item() for z, i in zip(log_probs, combination, strict=True)) - 1e-3 * deviation
                heapq.heappush(found, (-score, number, combination))
    while found:
        yield heapq.heappop(found)[2]


def _fill(space, log_probs, target, tolerance, frames: Tensor, own: list[int]) -> list[list[int] | None]:
    """For each of the `frames` (N, slots): its most probable combination within the budget, or None.

    `own` are the slots of single layers. Their indices in `frames` are the lowest that are allowed.
    """
    base = space.costs(frames)
    width = ((base - target * (1 - tolerance)) / BINS).clamp(min=1e-9 * target)  # cost of one bin
    scores = torch.full((len(frames), BINS + 1), -torch.inf, dtype=torch.float64)  # of each sum of saved cost
    scores[:, 0] = 0
    history = []
    for slot in own:
        choices = torch.arange(int(frames[0, slot]), space.num_servable[slot])
        moved = frames.repeat(len(choices), 1)
        moved[:, slot] = choices.repeat_interleave(len(frames))
        saved = ((base - space.costs(moved).view(len(choices), -1)) / width).round().clamp(0, BINS + 1).long()
        before = torch.arange(BINS + 1) - saved[..., None]  # (choices, N, bins)
        options = scores.expand(len(choices), -1, -1).gather(-1, before.clamp(min=0))
        options = options.masked_fill(before < 0, -torch.inf) + log_probs[slot].double()[choices][:, None, None]
        scores, best = options.max(0)
        history.append((slot, choices, saved, best.to(torch.int16)))
    return [
        _within_budget(space, target, tolerance, frame, row, scores[row], base[row], width[row], history)
        for row, frame in enumerate(frames)
    ]


def _within_budget(space, target, tolerance, frame, row, scores, base, width, history) -> list[int] | None:
    """The most probable combination of one frame whose exact cost is within the budget.

    Where the cost is not exactly a sum, or by rounding, the exact cost of a result differs from that of its bin. The
    difference is assumed for all bins, and the next result is taken.
    """
    costs, goal = base - width * torch.arange(BINS + 1), tolerance
    for _ in range(CORRECTIONS):
        deviation = (costs / target - 1).abs()
        values = (scores - 1e-3 * deviation).masked_fill(deviation > goal * (1 + 1e-9), -torch.inf)
        place = int(values.argmax())
        if values[place] == -torch.inf:
            return None
        found, at = frame.tolist(), place
        for slot, choices, saved, best in reversed(history):
            choice = int(best[row, at])
            found[slot], at = int(choices[choice]), at - int(saved[choice, row])
        exact = space.exact_cost(found)
        if abs(exact / target - 1) <= tolerance:
            return found
        costs, goal = costs + (exact - costs[place]), tolerance / 2
    return None
