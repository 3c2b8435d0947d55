"""Statistics of a few seeds: means with 95 % intervals, paired differences, and tokens to reach a value."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and half the width of its 95 % interval (Student's t). `half` is None for less than two values."""

    mean: float
    half: float | None
    number: int

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half

    def text(self, digits: int = 4, sign: bool = False) -> str:
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}".replace("-", "−")
        return mean if self.half is None else f"{mean} ± {self.half:.{digits}f}"


def estimate(values: Iterable[float]) -> Estimate:
    """The mean of independent values, one or more, with its interval."""
    values = list(values)
    half = None
    if len(values) > 1:
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
        half = float(quantile) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.mean(values), half, len(values))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """The mean difference ours − theirs over the seeds that both have. None if there is none."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    return estimate(differences) if differences else None


@dataclass(frozen=True)
class Tokens:
    """A number of tokens; `bound` is "" for an exact one, "≤" for at most and ">" for more than so many."""

    number: float
    bound: str = ""


def tokens_to_reach(points: Iterable[tuple[float, float]], goal: float) -> Tokens:
    """The tokens after which a falling curve is at `goal` or below it.

    `points` are (tokens, value), one or more. Between two points, the value is linear in the logarithm of the tokens.
    Outside the points nothing is extrapolated: the result is then a bound.
    """
    points = sorted(points)
    (before, high), *later = points
    if high <= goal:
        return Tokens(before, "≤")
    for tokens, value in later:
        if value <= goal:
            share = (high - goal) / (high - value)
            return Tokens(before * (tokens / before) ** share)
        before, high = tokens, value
    return Tokens(before, ">")


def ratio_to_sum(tokens: float, parts: Sequence[Tokens]) -> Tokens | None:
    """`tokens` divided by the sum of `parts`. None if bounds of both kinds leave it open."""
    bounds = {part.bound for part in parts} - {""}
    if len(bounds) > 1:
        return None
    flipped = {"≤": "≥", ">": "<"}  # a smaller sum is a larger ratio
    return Tokens(tokens / sum(part.number for part in parts), flipped[bounds.pop()] if bounds else "")
