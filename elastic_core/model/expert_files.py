"""Experts in files: a matrix each, under a number, where a model holds those of a layer in one tensor (E, out, in).

So transformers writes them, and so checkpoints in the wild hold them: ``experts.7.up_proj.weight`` is
``experts.up_proj[7]``. A file that holds the whole tensor under the model's own name is read as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from elastic_core.io.tensor_files import Entry, Stored

NUMBERED = re.compile(r"(?P<layer>.+\.experts)\.(?P<number>\d+)\.(?P<projection>\w+)\.weight")
STACKED = re.compile(r"(?P<layer>.+\.experts)\.(?P<projection>\w+)")


def place_in_stack(name: str) -> tuple[str, int] | None:
    """The tensor in which one expert's matrix of a file belongs, and where; None for a tensor by itself."""
    found = NUMBERED.fullmatch(name)
    return (f"{found['layer']}.{found['projection']}", int(found["number"])) if found else None


def is_stacked(name: str) -> bool:
    """Whether a tensor is written an expert at a time."""
    return STACKED.fullmatch(name) is not None


def matrix_name(name: str, number: int) -> str:
    """What one expert's matrix of a tensor is called."""
    found = STACKED.fullmatch(name)
    return f"{found['layer']}.{number}.{found['projection']}.weight"


@dataclass(frozen=True)
class StoredStack:
    """A layer's experts, one after the other, wherever they lie."""

    experts: tuple[Stored, ...]

    @property
    def entry(self) -> Entry:
        first = self.experts[0].entry
        return Entry(first.dtype, (len(self.experts), *first.shape))

    def read(self, runs: list[tuple[int, int]]) -> np.ndarray:
        """The experts of all runs [start, stop), as `Stored.read` gives rows."""
        chosen = [expert for start, stop in runs for expert in self.experts[start:stop]]
        return np.stack([expert.read([(0, expert.entry.shape[0])]) for expert in chosen])


def matrices(stored: Stored | StoredStack) -> tuple[Stored, ...]:
    """Every expert's matrix of a tensor, however it is stored."""
    if isinstance(stored, StoredStack):
        return stored.experts
    entry = Entry(stored.entry.dtype, stored.entry.shape[1:])
    return tuple(
        Stored(stored.path, entry, stored.offset + number * entry.num_bytes) for number in range(stored.entry.shape[0])
    )
