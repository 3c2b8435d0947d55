"""How a stream of tokens becomes rows of equal length, and in which order sources take turns. Arrays only, no files."""

import bisect
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

_LONGEST_SCHEDULE = 1 << 16
_BUFFER = 256


class Windows:
    """Rows of `row_length` consecutive tokens of running text (T,); the last token of one is the first of the next.

    With `keep_tail` a last, shorter row holds what is left; otherwise it is dropped.
    """

    def __init__(self, tokens: np.ndarray, row_length: int, keep_tail: bool = False):
        self._tokens = tokens
        self._row_length = row_length
        steps = len(tokens) - 1
        self._num_rows = -(-steps // (row_length - 1)) if keep_tail else steps // (row_length - 1)

    def __len__(self) -> int:
        return self._num_rows

    def read(self, row: int, out: np.ndarray) -> int:
        """Write a row to the front of `out` (row_length,); returns how many tokens it has."""
        start = row * (self._row_length - 1)
        window = self._tokens[start : start + self._row_length]
        out[: len(window)] = window
        return len(window)


class PackedDocuments:
    """Rows of at most `row_length` tokens made of whole documents; what is longer than a row is left out.

    `lead` is put before the first document of each row (None: nothing). Documents are taken in their order into a
    small buffer, and the longest that still fits a row goes in next; each document is in exactly one row.
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, row_length: int, lead: int | None):
        self._tokens = tokens
        self._offsets = np.array(offsets)  # in memory: read once per document of a row
        self._lead = lead
        lengths = np.diff(self._offsets)
        capacity = row_length - (lead is not None)
        self.shortest = int(lengths.min()) if len(lengths) else 0
        self.documents, self._row_starts = _pack(lengths, capacity)

    def __len__(self) -> int:
        return len(self._row_starts) - 1

    def read(self, row: int, out: np.ndarray) -> int:
        """Write a row to the front of `out` (row_length,); returns how many tokens it has."""
        size = 0
        if self._lead is not None:
            out[0] = self._lead
            size = 1
        for document in self.documents[self._row_starts[row] : self._row_starts[row + 1]]:
            start, end = self._offsets[document], self._offsets[document + 1]
            out[size : size + end - start] = self._tokens[start:end]
            size += end - start
        return int(size)


def _pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents in the order of packing, and where rows start in that order (rows + 1,)."""
    candidates = ((int(lengths[i]), int(i)) for i in np.flatnonzero(lengths <= capacity))
    waiting = sorted(itertools.islice(candidates, _BUFFER))
    order, row_starts, room = [], [0], capacity
    while waiting:
        fitting = bisect.bisect_right(waiting, (room, len(lengths)))
        if fitting == 0:
            row_starts.append(len(order))
            room = capacity
            continue
        length, document = waiting.pop(fitting - 1)
        order.append(document)
        room -= length
        if (new := next(candidates, None)) is not None:
            bisect.insort(waiting, new)
    if order:
        row_starts.append(len(order))
    return np.array(order, dtype=np.int64), np.array(row_starts, dtype=np.int64)


def schedule(shares: Sequence[float]) -> np.ndarray:
    """Turns of the sources, to be repeated for ever: source numbers (period,), int64.

    After every number of turns each source's count is less than one off its share: Tijdeman's rule for the chairman
    assignment problem (Discrete Mathematics 32, 1980). Shares that are ratios of small numbers, such as 0.4 : 0.35 :
    0.25, are kept exactly; others are rounded to 1/65536. At least one share must be positive, and none negative.
    """
    counts = _whole_numbers(shares)
    period, num_sources = sum(counts), sum(count > 0 for count in counts)
    if num_sources == 1:
        return np.array([i for i, count in enumerate(counts) if count], dtype=np.int64)
    # All in units of 1 / (period · (2k - 2)), so that nothing is rounded: a source may be given its next turn once
    # it is 1/(2k - 2) behind its share, and among those that may, the one whose turn would first be too late is next.
    scale = 2 * num_sources - 2
    given, turns = [0] * len(counts), []
    for turn in range(1, period + 1):
        ready = [s for s, n in enumerate(counts) if n and (n * turn - given[s] * period) * scale >= period]
        chosen = min(ready, key=lambda s: (((given[s] + 1) * scale - 1) / counts[s], s))
        given[chosen] += 1
        turns.append(chosen)
    return np.array(turns, dtype=np.int64)


def _whole_numbers(shares: Sequence[float]) -> list[int]:
    """Turns of each source in one period, in the ratio of the shares."""
    # Fraction(0.1) is not 1/10; a share too small for the rounding stays as it is.
    fractions = [Fraction(share).limit_denominator(10**6) or Fraction(share) for share in shares]
    fractions = [fraction / sum(fractions) for fraction in fractions]
    period = math.lcm(*(fraction.denominator for fraction in fractions))
    if period <= _LONGEST_SCHEDULE:
        return [int(fraction * period) for fraction in fractions]
    exact = [fraction * _LONGEST_SCHEDULE for fraction in fractions]
    counts = [max(math.floor(value), int(value > 0)) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: max(0, _LONGEST_SCHEDULE - sum(counts))]:
        counts[i] += 1
    return counts
