"""Experts in files: one numbered matrix for each expert. A model has one stack (E, out, in) for all experts of a layer.

transformers and published checkpoints write them so: ``experts.7.up_proj.weight`` in a file is
``experts.up_proj[7]`` in the model. Files with the whole stack under the model's own name can be read, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from elastic_core.io.tensor_files import Entry, Stored

NUMBERED = re.compile(r"(?P<layer>.+\.experts)\.(?P<number>\d+)\.(?P<projection>\w+)\.weight")
STACKED = re.compile(r"(?P<layer>.+\.experts)\.(?P<projection>\w+)")


def place_in_stack(name: str) -> tuple[str, int] | None:
    """For a matrix of one expert in a file: the name of its stack and its index there. None for other tensors."""
    found = NUMBERED.fullmatch(name)
    return (f"{found['layer']}.{found['projection']}", int(found["number"])) if found else None


def is_stacked(name: str) -> bool:
    """Whether a parameter is a stack, which files hold as one matrix for each expert."""
    return STACKED.fullmatch(name) is not None


def matrix_name(name: str, number: int) -> str:
    """The name in files of expert `number` of the stack `name`."""
    found = STACKED.fullmatch(name)
    return f"{found['layer']}.{number}.{found['projection']}.weight"


@dataclass(frozen=True)
class StoredStack:
    """The matrices of a layer's experts, in order. They may be in several files."""

    experts: tuple[Stored, ...]

    @property
    def entry(self) -> Entry:
        first = self.experts[0].entry
        return Entry(first.dtype, (len(self.experts), *first.shape))

    def read(self, runs: list[tuple[int, int]]) -> np.ndarray:
        """Read the experts [start, stop) of each of the `runs`, in the form of `Stored.read`."""
        chosen = [expert for start, stop in runs for expert in self.experts[start:stop]]
        return np.stack([expert.read([(0, expert.entry.shape[0])]) for expert in chosen])


def matrices(stored: Stored | StoredStack) -> tuple[Stored, ...]:
    """The matrix of every expert, for both ways in which files hold them."""
    if isinstance(stored, StoredStack):
        return stored.experts
    entry = Entry(stored.entry.dtype, stored.entry.shape[1:])
    return tuple(
        Stored(stored.path, entry, stored.offset + number * entry.num_bytes) for number in range(stored.entry.shape[0])
    )
