"""Refuses padded rows for which transformers' `generate` would not give what it gives for each row alone."""

import torch
from torch import Tensor
from transformers import GenerationConfig

from elastic_core.errors import UserError
from elastic_core.export.generation_options import value_of
from elastic_core.model import architectures


def check_padding(config, input_ids: Tensor, generation: GenerationConfig, options: dict) -> None:
    """Raise UserError unless every row of `input_ids` (B, L) is a text, after padding on the left or without padding.

    generation: the model's. options: those of `generate`; `attention_mask` (B, L) is 0 at padding. Without it,
    transformers takes every pad token for padding. Where the architecture computes with padding in a row (see
    `pads_exactly`), all padding is refused.
    """
    mask, source = options.get("attention_mask"), "attention_mask 0"
    if mask is None:
        mask = _guessed_mask(input_ids, generation, options)
        source = "no attention_mask was given, so transformers takes every pad token for padding"
    if mask is None or bool(mask.bool().all()):
        return
    if mask.shape != input_ids.shape:
        raise UserError(
            f"attention_mask: got shape {tuple(mask.shape)}; allowed: {tuple(input_ids.shape)}, as input_ids"
        )
    kept = mask.bool()
    wrong = [row for row, values in enumerate(kept) if not bool(values[-1])]
    if wrong:
        raise UserError(
            f"input_ids: rows {wrong[:5]} end with padding ({source}), and `generate` would continue the padding; "
            "pad on the left (tokenizer.padding_side = 'left'), and give an attention_mask"
        )
    wrong = [row for row, values in enumerate(kept) if bool((values[1:] < values[:-1]).any())]
    if wrong:
        raise UserError(
            f"input_ids: rows {wrong[:5]} have padding inside the text ({source}); allowed: only at the left end"
        )
    if not architectures.pads_exactly(config):
        raise UserError(
            f"input_ids: got padding ({source}), but this model's layers have biases (use_bias), so transformers "
            "computes with padding as with text; allowed: rows of the same length, or one row at a time"
        )


def _guessed_mask(input_ids: Tensor, generation: GenerationConfig, options: dict) -> Tensor | None:
    """The mask that transformers takes where none is given: 0 at pad tokens, unless these also end a text."""
    pad, end = (value_of(name, options, generation) for name in ("pad_token_id", "eos_token_id"))
    if pad is None or (end is not None and pad in torch.as_tensor(end)):
        return None
    return input_ids != pad
