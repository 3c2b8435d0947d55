"""What a ranking that was stopped has finished: sums over batches for the widths, and scores of layers for the depth.

A ranking that is started again with the same model, batches and options takes these over and computes the rest. With
one process, the result has the same bits as without a stop. Several processes add their sums in another order.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

WIDTHS, RATIOS, DEPTH = "widths.state", "ratios.state", "depth.state"  # each starts with the SHA-256 digest of the rest
DIGEST_BYTES = 32


@dataclass
class RankingState:
    """Where a ranking keeps what it has finished. The default keeps nothing.

    - `load(name)`: the bytes that were saved under a name, or None. The same on all processes.
    - `save(name, data)`: saves bytes, and replaces earlier ones at one moment. Called on all processes.
    - `is_first`: whether this is the first of all processes.
    - `seconds`: the least time between two saves of the sums for the widths. Those of a large model are large: with a
      basis, they include a matrix (hidden, hidden).
    """

    load: Callable[[str], bytes | None] = lambda name: None
    save: Callable[[str, bytes], None] | None = None
    is_first: bool = True
    seconds: float = 0.0
    _setting: object = field(default=None, init=False)
    _journal: list[dict[int, float]] = field(default_factory=list, init=False)
    _place: int = field(default=0, init=False)
    _saved_at: float = field(default_factory=time.monotonic, init=False)

    def load_widths(self) -> tuple[int, dict[str, Tensor], dict[str, int]]:
        """(number of finished batches, sums, counts). All of the sums are with the first process."""
        data = self._load(WIDTHS)
        if data is None:
            return 0, {}, {}
        done, totals, counts = torch.load(io.BytesIO(data), weights_only=True)
        if not self.is_first:
            totals, counts = {key: torch.zeros_like(total) for key, total in totals.items()}, dict.fromkeys(counts, 0)
        return done, totals, counts

    def is_due(self, reduce: Callable[[Tensor], Tensor]) -> bool:
        """Whether the sums are to be saved now. The first process decides; all processes call it together."""
        if self.save is None:
            return False
        is_late = self.is_first and time.monotonic() - self._saved_at >= self.seconds
        return bool(reduce(torch.tensor(float(is_late))) > 0)

    def save_widths(self, done: int, totals: dict[str, Tensor], counts: dict[str, int]) -> None:
        """Save the sums of all processes over the first `done` batches."""
        if self.save is not None:
            buffer = io.BytesIO()
            torch.save((done, totals, counts), buffer)
            self._save(WIDTHS, buffer.getvalue())
            self._saved_at = time.monotonic()

    def ratios(self, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The norm ratios that `compute` returns; from the state, if they were computed before the stop."""
        data = self._load(RATIOS)
        if data is not None:
            return torch.load(io.BytesIO(data), weights_only=True)
        found = compute()
        if self.save is not None:
            buffer = io.BytesIO()
            torch.save(found, buffer)
            self._save(RATIOS, buffer.getvalue())
        return found

    def begin_depth(self, setting) -> None:
        """Take over the scores of layers, if they were computed in the same setting (JSON values).

        The setting has the shapes of this process's batches, because another number of processes computes other scores.
        """
        self._setting, self._journal, self._place = setting, [], 0
        data = self._load(DEPTH)
        if data is not None:
            content = json.loads(data)
            if content["setting"] == setting:
                self._journal = [{int(layer): score for layer, score in entry.items()} for entry in content["scores"]]

    def once(self, compute: Callable[[], dict[int, float]]) -> dict[int, float]:
        """The scores (layer → score) that `compute` returns; from the state, if they were computed before the stop.

        The calls have to come in the same order every time, after `begin_depth`.
        """
        if self._place == len(self._journal):
            self._journal.append(compute())
            if self.save is not None:
                self._save(DEPTH, json.dumps({"setting": self._setting, "scores": self._journal}).encode())
        self._place += 1
        return dict(self._journal[self._place - 1])

    def _load(self, name: str) -> bytes | None:
        """What was saved under a name. None, with a warning, if it is damaged: then it is computed again."""
        data = self.load(name)
        if data is None or hashlib.sha256(data[DIGEST_BYTES:]).digest() == data[:DIGEST_BYTES]:
            return None if data is None else data[DIGEST_BYTES:]
        if self.is_first:
            logger.warning("%s of an earlier ranking is damaged; computing it again", name)
        return None

    def _save(self, name: str, data: bytes) -> None:
        self.save(name, hashlib.sha256(data).digest() + data)
