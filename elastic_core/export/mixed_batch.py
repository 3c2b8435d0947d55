"""A batch whose rows ask for different budgets of a NestedModel."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_core.errors import UserError
from elastic_core.export.elastic_checkpoint import BudgetLike
from elastic_core.model.submodel import Submodel

# Options of `generate` with one value for all rows of a batch, or with outputs that are no tensor of tokens.
REFUSED = ("past_key_values", "streamer", "return_dict_in_generate", "num_return_sequences")


def generate_mixed(model, input_ids: Tensor, budgets: list[BudgetLike], options: dict) -> Tensor:
    """Continue each row of input_ids (B, L) int64 with its own budget: → (B, L + most new tokens of a row).

    model: a NestedModel. budgets: one for each row. options: those of its `generate`.

    Rows of one budget are computed together. Each row is continued as it would be with its budget alone. Rows with
    fewer new tokens end with pad tokens, as in transformers. Raises UserError for another number of budgets, and for
    options that need all rows in one call.
    """
    if len(budgets) != len(input_ids):
        raise UserError(f"budget: got {len(budgets)} for {len(input_ids)} rows; allowed: one for all, or one each")
    if given := [name for name in REFUSED if options.get(name)]:
        raise UserError(f"{', '.join(given)}: not allowed where rows have budgets of their own; call once per budget")
    rows_of: dict[Submodel, list[int]] = {}
    for row, budget in enumerate(budgets):
        rows_of.setdefault(model.submodel(budget), []).append(row)
    continued = {}
    for submodel, rows in rows_of.items():
        own = {name: _rows(value, rows, len(input_ids)) for name, value in options.items()}
        continued |= dict(zip(rows, model.generate(input_ids[rows], submodel, **own), strict=True))
    length = max(map(len, continued.values()))
    output = input_ids.new_full((len(input_ids), length), _pad_id(model.at(next(iter(rows_of))), options))
    for row, tokens in continued.items():
        output[row, : len(tokens)] = tokens
    return output


def _rows(value, rows: list[int], num_rows: int):
    """The rows of an option that has a value for each row, such as attention_mask; other options as they are."""
    return value[rows] if torch.is_tensor(value) and value.dim() > 0 and len(value) == num_rows else value


def _pad_id(model, options: dict) -> int:
    """The token that `generate` writes after the end of a row: the pad token, or else the first eos token."""
    generation = options.get("generation_config") or model.generation_config
    for name in ("pad_token_id", "eos_token_id"):
        found = options.get(name, getattr(generation, name))
        if found is not None:
            return torch.as_tensor(found).flatten()[0].item()
    return 0  # without an eos token, all rows have the same number of new tokens, unless max_time ends them
