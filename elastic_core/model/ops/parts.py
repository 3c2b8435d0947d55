"""Layers on a part of every row, where several workers share a sequence: what passes from one part to another.

Attention needs the keys and values of all parts. The convolution needs the last inputs of the part before. The scan
needs the state at the end of the part before: every worker scans its own part from a state of 0, all exchange the
states that they end with and the decays over their parts, and each adds what the parts before it contribute.

Letters in shapes: B rows, l positions of a part, H heads, P channels per head, G groups, N state size, R = H/G.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_core.model.documents import Documents
from elastic_core.model.ops.device_copy import to_device


@dataclass(frozen=True)
class Part:
    """Part `rank` of `size` equal parts of every row, with one worker per part.

    `gather(x)` returns the x of all parts, (size, ...), in their order, with gradients. All workers of a row call it
    together and in the same order.
    """

    rank: int
    size: int
    gather: Callable[[Tensor], Tensor]

    def positions(self, row_length: int) -> slice:
        """The positions of the part in a row."""
        length = row_length // self.size
        return slice(self.rank * length, (self.rank + 1) * length)


class PartDocuments(Documents):
    """The documents of one part of every row. `lengths`, `ids` and starts are those of the part alone.

    - `positions` (B, l): the number of each position in its document, which may begin in an earlier part.
    - `row_length`: the positions of a whole row.
    - `continues` (B, l) bool: the position belongs to the document that the part before ends with.
    - `reaches_end` (B, l) bool: no document starts after the position.
    - `pieces`: for each document in the part: (row, first position in the part, number of positions in the part, first
      position in the row, number of positions up to the end of the part).
    """

    def __init__(self, document_ids: Tensor, device: torch.device, part: Part):
        """`document_ids` (B, L) int64 of whole rows, in CPU memory."""
        where = part.positions(document_ids.shape[1])
        super().__init__(document_ids[:, where], device)
        self.part, self.row_length, self._whole, self._device = part, document_ids.shape[1], document_ids, device
        whole = Documents(document_ids, torch.device("cpu"))
        self.positions = to_device(whole.positions[:, where], device)
        own = document_ids[:, where]
        before = document_ids[:, where.start - 1 : where.start] if part.rank else torch.full((len(own), 1), -1)
        self.continues = to_device(own == before, device)
        self.reaches_end = to_device(own == own[:, -1:], device)
        self._with_halo: dict[int, Documents] = {}
        self.pieces = self._find_pieces(whole.positions[:, where])

    def _find_pieces(self, positions: Tensor) -> list[tuple[int, int, int, int, int]]:
        first, length = self.part.positions(self.row_length).start, positions.shape[1]
        pieces, start, numbers = [], 0, positions.flatten().tolist()
        for count in self.lengths:
            row, offset = divmod(start, length)
            pieces.append((row, offset, count, first + offset - numbers[start], numbers[start] + count))
            start += count
        return pieces

    @functools.cached_property
    def key_index(self) -> Tensor:
        """The positions (as numbers of positions in all whole rows) of every piece's keys, one piece after another."""
        found = [torch.arange(count) + row * self.row_length + start for row, _, _, start, count in self.pieces]
        return to_device(torch.cat(found), self._device)

    @functools.cached_property
    def cumulative_key_lengths(self) -> Tensor:
        """0, and the sums of the numbers of keys of the pieces, int32."""
        counts = torch.tensor([0, *(count for *_, count in self.pieces)])
        return to_device(counts.cumsum(0).to(torch.int32), self._device)

    def with_halo(self, halo: int) -> Documents:
        """The documents of the part with `halo` positions before it; before the first part they are a document."""
        if halo not in self._with_halo:  # the same for all layers
            where = self.part.positions(self.row_length)
            before = self._whole[:, max(0, where.start - halo) : where.start]
            if self.part.rank == 0:
                before = torch.full((len(self._whole), halo), -1)
            self._with_halo[halo] = Documents(torch.cat([before, self._whole[:, where]], 1), self._device)
        return self._with_halo[halo]


def part_of(documents: Documents | None) -> Part | None:
    """The part that the layers compute, or None if rows are whole."""
    return documents.part if isinstance(documents, PartDocuments) else None


def attention_with_earlier_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: PartDocuments,
    attention: Callable[..., Tensor],
    variable_length: Callable | None,
) -> Tensor:
    """Causal attention of a part's queries to the keys and values of its part and of earlier ones, by documents.

    query (B, l, A, d), key and value (B, l, KV, d) → (B, l, A, d). `variable_length(query, keys, values, query_ends,
    key_ends, longest_query, longest_key)` computes all documents in one kernel; None: one call of `attention(query,
    key, value, attn_mask, is_causal)` per document.
    """
    size = key.shape[-1]
    gathered = documents.part.gather(torch.cat([key, value], -1)).transpose(0, 1)  # (B, size, l, KV, 2d)
    keys, values = gathered.reshape(-1, *gathered.shape[-2:]).split(size, dim=-1)  # all positions of all whole rows
    queries = query.flatten(0, 1)
    if variable_length is not None:
        picked = (t.index_select(0, documents.key_index) for t in (keys, values))
        ends, longest = (documents.cumulative_lengths, documents.cumulative_key_lengths), max(documents.lengths)
        longest_key = max(count for *_, count in documents.pieces)
        return variable_length(queries, *picked, *ends, longest, longest_key).view(query.shape)
    outputs = []
    for piece, (row, _, count, start, keys_of) in zip(queries.split(documents.lengths), documents.pieces, strict=True):
        first = row * documents.row_length + start
        parts = [t[None] for t in (piece, keys[first : first + keys_of], values[first : first + keys_of])]
        seen = None
        if count < keys_of:  # the last query sees all keys
            seen = torch.ones(count, keys_of, dtype=torch.bool, device=query.device).tril(keys_of - count)
        outputs.append(attention(*parts, attn_mask=seen, is_causal=seen is None)[0])
    return torch.cat(outputs).view(query.shape)


def with_inputs_before(x: Tensor, halo: int, documents: PartDocuments) -> Tensor:
    """x (B, l, C) with the last `halo` positions of the part before in front; zeros before the first part."""
    part = documents.part
    ends = part.gather(x[:, x.shape[1] - halo :].contiguous())
    # All workers use what is gathered: otherwise the others would wait for their part of its gradients.
    before = ends[part.rank - 1] * float(part.rank > 0)
    return torch.cat([before, x], 1)


def from_earlier_parts(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, documents: PartDocuments) -> Tensor:
    """What the states of earlier parts add to the scan's outputs, (B, l, H, P). For the arguments see `ssd`.

    Sums are in the type of dt, and exponents in float64, as in the scan.
    """
    part, groups, wide = documents.part, B.shape[2], dt.dtype
    # Products are never in a lower precision, even if the layers use autocast. The meta device has no autocast.
    with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        x, B, C = x.to(wide), B.to(wide), C.to(wide)
        total = (dt * A).double().cumsum(1)  # (B, l, H): the exponent of the decay from the start of the part
        to_end = (total[:, -1:] - total).exp().to(wide) * documents.reaches_end[..., None]
        added = (x * (dt * to_end)[..., None]).unflatten(2, (groups, -1))  # (B, l, G, R, P)
        # (B, G, N, l) @ (B, G, l, R·P): the state at the end of the part, if it begins with 0
        own = B.permute(0, 2, 3, 1) @ added.flatten(3).transpose(1, 2)
        decay = total[:, -1].exp().to(wide) * documents.continues[:, -1:]  # (B, H)
        state = _state_before(part, own, decay, groups)
        y = C.transpose(1, 2) @ state  # (B, G, l, R·P)
        from_start = total.exp().to(wide) * documents.continues[..., None]  # (B, l, H)
        return y.transpose(1, 2).reshape(x.shape) * from_start[..., None]


def _state_before(part: Part, own: Tensor, decay: Tensor, groups: int) -> Tensor:
    """The state at the start of the part, (B, G, N, R·P), from the states that all parts end with and their decays."""
    gathered = part.gather(torch.cat([own.flatten(1), decay], 1))  # (size, B, G·N·R·P + H)
    states, decays = gathered.split([own[0].numel(), decay.shape[1]], dim=2)
    state = torch.zeros_like(own) * gathered[0, 0, 0]  # in the graph of all workers, as above
    for earlier in range(part.rank):
        factor = decays[earlier].unflatten(1, (groups, 1, -1, 1))  # (B, G, 1, R, 1)
        by_head = state.unflatten(3, (factor.shape[3], -1)) * factor
        state = by_head.flatten(3) + states[earlier].view_as(own)
    return state
