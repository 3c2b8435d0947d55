"""The texts on which units and layers are scored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, int64

from elastic_core.data.loader import IGNORED_LABEL, Batch
from elastic_core.errors import UserError
from elastic_core.model.documents import Documents, documents_of


class Texts(NamedTuple):
    """Rows of tokens on the device of the model: input ids and labels, both (B, L) int64, and their documents."""

    input_ids: Tensor
    labels: Tensor
    documents: Documents | None


def calibration_texts(batches: Iterable[Tensor | Batch], num_parts: int = 1) -> list[Texts]:
    """The texts of batches, which are token ids (B, L) int64 with L ≥ 2, each row one document, or a loader's batches.

    Every batch is divided into at most `num_parts` parts of equally many rows. Padding is left out: where a part has
    some, its rows become one row of all their documents, which do not see each other. Raises UserError for other
    tensors, and if there is no batch.
    """
    batches = [batch if isinstance(batch, Batch) else Batch(batch, None, None) for batch in batches]
    tensors = [batch.input_ids for batch in batches]
    if not tensors or any(ids.dim() != 2 or ids.dtype != int64 or ids.shape[1] < 2 for ids in tensors):
        raise UserError("batches: expected one or more int64 tensors (B, L) of token ids with L ≥ 2")
    return [_texts(part) for batch in batches for part in _divided(batch, num_parts)]


def _divided(batch: Batch, num_parts: int) -> list[Batch]:
    ids = batch.input_ids.chunk(num_parts)
    others = ([None] * len(ids) if tensor is None else tensor.chunk(num_parts) for tensor in batch[1:])
    return [Batch(*part) for part in zip(ids, *others, strict=True)]


def _texts(batch: Batch) -> Texts:
    ids, labels, numbers = batch
    if labels is None:
        labels = F.pad(ids[:, 1:], (0, 1), value=IGNORED_LABEL)
    labels = labels.to(ids.device)
    if numbers is not None and not bool((is_text := numbers < ids.shape[1]).all()):
        rows = torch.arange(len(numbers))[:, None] * ids.shape[1]  # no two rows have the same number of a document
        ids, labels = (t[is_text.to(t.device)][None] for t in (ids, labels))
        numbers = (numbers + rows)[is_text][None]
    return Texts(ids, labels, documents_of(numbers, ids))
