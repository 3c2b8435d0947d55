"""Checks of a parent before any work starts: of its files, from headers alone, and of its weights, block by block."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from elastic_core.data.tokenizer import check_json_file
from elastic_core.errors import UserError
from elastic_core.io import storage
from elastic_core.io.filesystem import Location
from elastic_core.io.tokenizer_files import TOKENIZER_FILES
from elastic_core.model import architectures, hf
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.model.files.stored_forward import stored_logits

BLOCK_VALUES = 1 << 22  # of a tensor that are checked at one time
ROUNDING = 1e-5  # of the largest logit; smaller differences are rounding in float32
NAMED = 3  # how many bad tensors a message names


def check_parent_files(location: Location) -> None:
    """Raise UserError unless the files of a parent are whole and fit its config.json. Takes seconds, also for a URL.

    It reads config.json, the other JSON files, the index and the header of every safetensors file, but no weights (see
    `check_weights`). One exception: where a local directory has a head beside tied embeddings, it compares the two.
    """
    config = hf.read_config(location)
    for name in storage.list_names(location):
        if name in TOKENIZER_FILES and name.endswith(".json"):
            check_json_file(storage.join(location, name))
    reader, shapes = hf.TensorReader(location), architectures.shapes(config)
    reader.check(shapes)
    if not storage.is_url(location):
        reader.check_tied_head(next(iter(shapes)))


def check_weights(reader: hf.TensorReader, names: list[str]) -> None:
    """Raise UserError if weights are NaN or infinite in float32, with the first such tensors and how many they are.

    `names`: all parameters. One block of rows is in memory at a time.
    """
    bad: dict[str, int] = {}
    for name in names:
        entry = reader.stored(name).entry
        step = max(1, BLOCK_VALUES // max(1, entry.row_bytes // entry.dtype.itemsize))
        for start in range(0, entry.shape[0], step):
            rows = reader.read(name, slice(start, start + step)).float()  # a float64 may be infinite in float32
            if count := rows.numel() - int(rows.isfinite().sum()):
                bad[name] = bad.get(name, 0) + count
    if bad:
        first = ", ".join(f"{name} ({count:,} values)" for name, count in list(bad.items())[:NAMED])
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise UserError(
            f"{reader.directory}: {len(bad)} of {len(names)} tensors hold NaN or infinite values: {first}{more}; "
            "copy the model again, or take another checkpoint of it"
        )


@torch.no_grad()
def check_logits(model: ElasticModel, input_ids: Tensor, where: str) -> None:
    """Raise UserError if a model's logits are not finite, or are the same for every token and position.

    input_ids (B, L) int64 of different tokens. `where` starts the message.
    """
    are_zero = ((name, not bool(parameter.any())) for name, parameter in model.named_parameters())
    judge_logits(model(input_ids).float(), are_zero, where)


def check_stored_logits(model: ElasticModel, reader: hf.TensorReader, input_ids: Tensor, where: str) -> None:
    """The same for weights in files; memory holds one layer at a time. `model` is on the meta device."""
    are_zero = ((name, not bool(reader.read(name).any())) for name, _ in model.named_parameters())
    judge_logits(stored_logits(model, reader, input_ids), are_zero, where)


def judge_logits(logits: Tensor, are_zero: Iterable[tuple[str, bool]], where: str) -> None:
    """Raise UserError for logits (B, L, vocab) that are not finite, or the same for every token and position.

    are_zero: for every parameter, its name and whether it is all zero; read only for the message.
    """
    if not bool(logits.isfinite().all()):
        raise UserError(f"{where}: the model computes NaN or infinite logits; copy the model again")
    negligible = ROUNDING * logits.abs().max()
    by_token, by_position = (logits.amax(dim) - logits.amin(dim) for dim in (2, 1))
    if by_token.max() <= negligible or by_position.max() <= negligible:
        what = "every token" if by_token.max() <= negligible else "every text"
        zero = [name for name, is_zero in are_zero if is_zero]
        weights = f"; {len(zero)} tensors are all zero, such as {', '.join(zero[:NAMED])}" if zero else ""
        raise UserError(f"{where}: the model's logits are the same for {what}{weights}; it has learnt nothing")
