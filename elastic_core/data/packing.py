"""Rows of equal length from documents, and the order in which sources alternate. Arrays only, no files."""

import bisect
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

_LONGEST_SCHEDULE = 1 << 16  # turns
_BUFFER = 1024  # parts among which the packing chooses


def parts_of_documents(offsets: np.ndarray, room: int, too_long: str) -> tuple[np.ndarray, np.ndarray]:
    """The parts of documents that are read: their first tokens, and their numbers of positions, each (N,) int64.

    `offsets` (num_documents + 1,) are the starts of the documents. A part with p positions has p + 1 tokens: at each
    position, one token is the input and the next one is the label. A document of n tokens has n - 1 positions. If that
    is more than `room`, `too_long` says what happens: "split" divides it into parts of `room` positions, so that every
    token except the first is a label once; "truncate" keeps the first part; "drop" leaves the document out.
    """
    starts, lengths = np.array(offsets[:-1], dtype=np.int64), np.diff(offsets) - 1
    if too_long == "truncate":
        lengths = np.minimum(lengths, room)
    elif too_long == "split":
        counts = -(-lengths // room)
        numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of a part in its document
        starts = np.repeat(starts, counts) + numbers * room
        lengths = np.minimum(np.repeat(lengths, counts) - numbers * room, room)
    keep = (lengths >= 1) & (lengths <= room)
    return starts[keep], lengths[keep]


class PackedRows:
    """Rows of at most `room` positions, each of one or more whole parts of documents (see `parts_of_documents`).

    Every part is in exactly one row. A buffer holds the next 1024 parts, and the longest of them that fits the rest of
    the row is added to it (best fit). If none fits, a new row starts.
    """

    def __init__(self, starts: np.ndarray, lengths: np.ndarray, room: int):
        order, self._row_starts = _pack(lengths, room)
        self._starts, self._lengths = starts[order], lengths[order]

    def __len__(self) -> int:
        return len(self._row_starts) - 1

    def parts(self, row: int) -> list[tuple[int, int]]:
        """(First token, number of positions) of each part in a row."""
        part = slice(self._row_starts[row], self._row_starts[row + 1])
        return list(zip(self._starts[part].tolist(), self._lengths[part].tolist(), strict=True))


def _pack(lengths: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """The parts' indices in the order of the rows, and the start of each row in it (num_rows + 1,), both int64."""
    full = np.flatnonzero(lengths == room)  # these fill a row each, so the loop need not see them
    candidates = ((int(lengths[i]), int(i)) for i in np.flatnonzero(lengths < room))
    buffer = sorted(itertools.islice(candidates, _BUFFER))  # (length, part), shortest first
    order, row_starts, free = [], [], 0
    while buffer:
        num_fitting = bisect.bisect_right(buffer, (free, len(lengths)))
        if num_fitting == 0:
            row_starts.append(len(order))
            free = room
            continue
        length, part = buffer.pop(num_fitting - 1)
        order.append(part)
        free -= length
        if (new := next(candidates, None)) is not None:
            bisect.insort(buffer, new)
    starts = np.concatenate([np.arange(len(full)), len(full) + np.array(row_starts, dtype=np.int64)])
    order = np.concatenate([full, np.array(order, dtype=np.int64)])
    return order, np.append(starts, len(order))


def schedule(shares: Sequence[float]) -> np.ndarray:
    """The order in which the sources take turns: source numbers (period,), int64. It repeats without end.

    After n turns, a source has had n times its share of the turns, with an error below 1, for every n. This is
    Tijdeman's algorithm for the chairman assignment problem (Discrete Mathematics 32, 1980). Shares that are ratios of
    small integers, such as 0.4 : 0.35 : 0.25, are exact; others are rounded to 1/65536. The caller has checked that no
    share is negative and at least one is positive.
    """
    counts = _turns_per_period(shares)
    period, num_sources = sum(counts), sum(count > 0 for count in counts)
    if num_sources == 1:
        return np.array([i for i, count in enumerate(counts) if count], dtype=np.int64)
    # With k sources, a source is ready for its next turn when it is at least 1/(2k - 2) behind its share. Each ready
    # source has a deadline for its next turn. The source with the earliest deadline gets the turn. Readiness is
    # tested on values multiplied by period · (2k - 2): these are integers, so there is no rounding.
    scale = 2 * num_sources - 2
    num_given, turns = [0] * len(counts), []
    for turn in range(1, period + 1):
        ready = [s for s, n in enumerate(counts) if n and (n * turn - num_given[s] * period) * scale >= period]
        chosen = min(ready, key=lambda s: (((num_given[s] + 1) * scale - 1) / counts[s], s))
        num_given[chosen] += 1
        turns.append(chosen)
    return np.array(turns, dtype=np.int64)


def _turns_per_period(shares: Sequence[float]) -> list[int]:
    """Each source's number of turns in one period, in the ratio of the shares."""
    # Fraction(0.1) is not exactly 1/10, so round it to a small denominator. Do not round a tiny share to 0.
    fractions = [Fraction(share).limit_denominator(10**6) or Fraction(share) for share in shares]
    fractions = [fraction / sum(fractions) for fraction in fractions]
    period = math.lcm(*(fraction.denominator for fraction in fractions))
    if period <= _LONGEST_SCHEDULE:
        return [int(fraction * period) for fraction in fractions]
    exact = [fraction * _LONGEST_SCHEDULE for fraction in fractions]
    counts = [max(math.floor(value), int(value > 0)) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: max(0, _LONGEST_SCHEDULE - sum(counts))]:
        counts[i] += 1  # the largest remainders are rounded up
    return counts
