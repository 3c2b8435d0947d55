"""A batch whose rows ask for different budgets of a NestedModel."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig

from elastic_core.errors import UserError
from elastic_core.export.elastic_checkpoint import BudgetLike
from elastic_core.export.generation_options import ONE_TENSOR, check_options, value_of
from elastic_core.model.submodel import Submodel

ALLOWED = ONE_TENSOR | {"past_key_values": None, "streamer": None}  # the last two are for all rows of a batch together


def generate_mixed(model, input_ids: Tensor, budgets: list[BudgetLike], options: dict) -> Tensor:
    """Continue each row of input_ids (B, L) int64 with its own budget: → (B, L + most new tokens of a row).

    model: a NestedModel. budgets: one for each row. options: those of its `generate`.

    Rows of one budget are computed together. Each row is continued as it would be with its budget alone. Rows with
    fewer new tokens end with pad tokens, as in transformers. Raises UserError for another number of budgets, and for
    options that need all rows in one call.
    """
    if len(budgets) != len(input_ids):
        raise UserError(f"budget: got {len(budgets)} for {len(input_ids)} rows; allowed: one for all, or one each")
    rows_of: dict[Submodel, list[int]] = {}
    for row, budget in enumerate(budgets):
        rows_of.setdefault(model.submodel(budget), []).append(row)
    generation = model.at(budgets[0]).generation_config
    check_options(ALLOWED, options, generation, "where rows have budgets of their own; call once per budget")
    continued = {}
    for submodel, rows in rows_of.items():
        own = {name: _rows(value, rows, len(input_ids)) for name, value in options.items()}
        continued |= dict(zip(rows, model.generate(input_ids[rows], submodel, **own), strict=True))
    length = max(map(len, continued.values()))
    output = input_ids.new_full((len(input_ids), length), _pad_id(generation, options))
    for row, tokens in continued.items():
        output[row, : len(tokens)] = tokens
    return output


def _rows(value, rows: list[int], num_rows: int):
    """The rows of an option that has a value for each row, such as attention_mask; other options as they are."""
    return value[rows] if torch.is_tensor(value) and value.dim() > 0 and len(value) == num_rows else value


def _pad_id(generation: GenerationConfig, options: dict) -> int:
    """The token that `generate` writes after the end of a row: the pad token, or else the first eos token."""
    for name in ("pad_token_id", "eos_token_id"):
        found = value_of(name, options, generation)
        if found is not None:
            return torch.as_tensor(found).flatten()[0].item()
    return 0  # without an eos token, all rows have the same number of new tokens, unless max_time ends them
