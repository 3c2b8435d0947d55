"""Documents in packed rows: what layers need so that the documents of a row do not see each other."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from elastic_core.errors import UserError
from elastic_core.model.ops.device_copy import to_device


class Documents:
    """Where documents begin in rows of L positions; B rows.

    - `ids` (B, L) int32 on the device of the model: the number of each position's document in its row, from 0.
    - `positions` (B, L) int64: the number of each position in its document, from 0.
    - `inner_starts` (N,) int64: the first positions of documents, without those at the start of a row. They are
      numbers of positions in all rows, one row after another.
    - `is_inner_start` (B, L) bool: the same positions.
    - `lengths`: the number of positions of every document, one row after another.
    - `cumulative_lengths` (N + 1,) int32: 0, and the end of every document, as numbers of positions in all rows.
    - `row_length`: L, or more if these are parts of longer rows (ops/parts.py).
    - `uncompiled(function, *args)` calls a function that reads `lengths`, or one of the tensors that are as long as
      there are documents. torch.compile must not trace it: it would make new graphs for every batch.
    """

    def __init__(self, document_ids: Tensor, device: torch.device):
        """`document_ids` (B, L) int64, in CPU memory: the lengths are read from it."""
        batch, length = document_ids.shape
        self.row_length = length
        is_start = torch.ones(batch, length, dtype=torch.bool)
        is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        starts = is_start.flatten().nonzero().flatten()
        ends = torch.cat([starts[1:], torch.tensor([batch * length])])
        positions = torch.arange(batch * length) - starts.repeat_interleave(ends - starts)
        self.lengths: list[int] = (ends - starts).tolist()
        self.ids = to_device((is_start.cumsum(1) - 1).to(torch.int32), device)
        self.positions = to_device(positions.view(batch, length), device)
        self.inner_starts = to_device(starts[starts % length > 0], device)
        is_start[:, 0] = False
        self.is_inner_start = to_device(is_start, device)
        self.cumulative_lengths = to_device(torch.cat([starts, ends[-1:]]).to(torch.int32), device)
        self._masks: dict[torch.dtype, Tensor] = {}
        # Whoever compiles has imported the compiler. Without it, its import would take a second.
        self.uncompiled = _disabled_call() if "torch._dynamo" in sys.modules else _call

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of attention, (B, 1, L, L): 0 for an earlier position of the same document."""
        if dtype not in self._masks:  # the same for all layers
            is_seen = (self.ids[:, :, None] == self.ids[:, None, :]).tril()[:, None]
            mask = torch.zeros(is_seen.shape, dtype=dtype, device=self.ids.device)
            self._masks[dtype] = mask.masked_fill_(~is_seen, float("-inf"))
        return self._masks[dtype]


def _call(function: Callable[..., Tensor], *args) -> Tensor:
    return function(*args)


@functools.cache  # one function in all batches: graphs are valid for this function only
def _disabled_call() -> Callable[..., Tensor]:
    return torch.compiler.disable(_call)


def documents_of(document_ids: Tensor | None, input_ids: Tensor) -> Documents | None:
    """The documents of packed rows of `input_ids` (B, L), on their device. None if every row is one document.

    `document_ids` (B, L) int64, not decreasing in a row. If they are on a GPU, they are copied to the CPU, for which
    the GPU is waited for. Raises UserError for ids of another type or shape, and for ids that decrease in a row.
    """
    if document_ids is None:
        return None
    if document_ids.shape != input_ids.shape or document_ids.dtype != torch.int64:
        found = f"{document_ids.dtype} {tuple(document_ids.shape)}"
        raise UserError(f"document_ids: got {found}; allowed: int64 {tuple(input_ids.shape)}, one for every input id")
    ids = document_ids.cpu()
    if bool((ids[:, 1:] < ids[:, :-1]).any()):
        raise UserError(
            "document_ids: an id is smaller than the one before it; allowed: ids that never decrease in a row"
        )
    return None if bool((ids[:, :1] == ids).all()) else Documents(ids, input_ids.device)
