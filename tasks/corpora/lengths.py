"""How long documents are, and what a training sequence of a given length loses of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from elastic_core.data.packing import parts_of_documents


@dataclass(frozen=True)
class Bucket:
    """Documents of `shortest` to 2 · `shortest` - 1 tokens: how many they are, and how many tokens they have."""

    shortest: int  # a power of two
    num_documents: int
    num_tokens: int


@dataclass(frozen=True)
class Fit:
    """What becomes of documents in sequences of some length."""

    sequence_length: int
    num_too_long: int  # documents with more tokens than fit into a sequence
    lost_share: float  # of all tokens that could be predicted


def histogram(offsets: np.ndarray) -> list[Bucket]:
    """Documents by powers of two of their length, the shortest first, without gaps. `offsets`: see token_files.py."""
    lengths = np.diff(offsets)
    if len(lengths) == 0:
        return []
    powers = np.frexp(lengths)[1] - 1  # the largest power of two that is not above the length
    documents = np.bincount(powers)
    tokens = np.bincount(powers, weights=lengths).astype(np.int64)
    first = int(powers.min())
    return [Bucket(1 << p, int(documents[p]), int(tokens[p])) for p in range(first, len(documents))]


def fit(offsets: np.ndarray, sequence_length: int, too_long: str) -> Fit:
    """What is lost of documents by `too_long` (split, truncate or drop) in sequences of `sequence_length` tokens."""
    positions = np.diff(offsets) - 1
    _, kept = parts_of_documents(offsets, sequence_length, too_long)
    total = int(positions.sum())
    lost = 1 - int(kept.sum()) / total if total else 0.0
    return Fit(sequence_length, int((positions > sequence_length).sum()), lost)


def contexts(settings, source: str) -> dict[str, int]:
    """Stage → sequence_length, for the stages that read a source. `settings`: all of params.yaml.

    They train or calibrate on it, or evaluate on its held-out documents (see `split_of`).
    """
    stages = {
        "parent": settings.parent.training if settings.parent.path is None else None,
        **{name: getattr(settings, name) for name in ("rank", "train_short", "train_extended")},
    }
    found = {
        name: stage.sequence_length for name, stage in stages.items() if stage is not None and _share(stage, source) > 0
    }
    is_evaluated = source in settings.evaluate.held_out
    return found | ({"evaluate": settings.evaluate.sequence_length} if is_evaluated else {})


def split_of(stage: str) -> str:
    """The split of the data that a stage reads."""
    return "held_out" if stage == "evaluate" else "train"


def _share(stage, source: str) -> float:
    mixture: Mapping[str, float] = stage.mixture
    return mixture.get(source, 0.0) if mixture else 1.0
