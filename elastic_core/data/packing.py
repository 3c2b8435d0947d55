"""Rows of equal length from a stream of tokens, and the order in which sources alternate. Arrays only, no files."""

import bisect
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

_LONGEST_SCHEDULE = 1 << 16  # turns
_BUFFER = 256  # documents among which the packing chooses


class Windows:
    """Rows of `row_length` consecutive tokens of running text (T,).

    Neighbouring rows overlap: the last token of a row is the first token of the next. Tokens after the last full row
    are dropped, or with `keep_tail` become a shorter row.
    """

    def __init__(self, tokens: np.ndarray, row_length: int, keep_tail: bool = False):
        self._tokens = tokens
        self._row_length = row_length
        num_labels = len(tokens) - 1  # every token but the first is predicted once
        self._num_rows = -(-num_labels // (row_length - 1)) if keep_tail else num_labels // (row_length - 1)

    def __len__(self) -> int:
        return self._num_rows

    def read(self, row: int, out: np.ndarray) -> int:
        """Write a row to the front of `out` (row_length,); returns how many tokens it has."""
        start = row * (self._row_length - 1)
        window = self._tokens[start : start + self._row_length]
        out[: len(window)] = window
        return len(window)


class PackedDocuments:
    """Rows of at most `row_length` tokens, made of complete documents. Longer documents are left out.

    Each other document is in exactly one row. `lead` is a token that comes before the first document of each row (None:
    no such token). Packing: a buffer holds the next 256 documents, and the longest of them that fits the rest of the
    row is added to it. If none fits, a new row starts.
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, row_length: int, lead: int | None):
        self._tokens = tokens
        self._offsets = np.array(offsets)  # copied from disk to memory, because every row reads them
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
    """The documents' indices in the order of the rows, and the start of each row in it (num_rows + 1,), both int64."""
    candidates = ((int(lengths[i]), int(i)) for i in np.flatnonzero(lengths <= capacity))
    buffer = sorted(itertools.islice(candidates, _BUFFER))  # (length, document), shortest first
    order, row_starts, free = [], [0], capacity
    while buffer:
        num_fitting = bisect.bisect_right(buffer, (free, len(lengths)))
        if num_fitting == 0:
            row_starts.append(len(order))
            free = capacity
            continue
        length, document = buffer.pop(num_fitting - 1)
        order.append(document)
        free -= length
        if (new := next(candidates, None)) is not None:
            bisect.insort(buffer, new)
    if order:
        row_starts.append(len(order))
    return np.array(order, dtype=np.int64), np.array(row_starts, dtype=np.int64)


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
