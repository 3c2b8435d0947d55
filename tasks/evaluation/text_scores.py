"""Scores a transformers model on held-out text: loss, KL to the parent, bits per byte. Counts its parameters."""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_core.data.loader import IGNORED_LABEL, Batch, TokenData, held_out_batches
from elastic_core.errors import UserError
from tasks.evaluation.batch_sizes import first_batch_size, fitting
from tasks.evaluation.teacher import CachedTeacher, LiveTeacher, States, head_inputs, write_head, write_states
from tasks.settings.sections import Evaluate

LOGITS = 2**26  # that exist at one time: those of a whole text of 49,152 tokens would take more memory than the model


@torch.no_grad()
def text_scores(
    model, parent: tuple[States, Tensor] | None, batches: Iterator[Batch], logits: int = LOGITS
) -> tuple[float, float, int]:
    """Sums over all predicted tokens: cross-entropy in nats, KL(parent ‖ model) in nats, and the number of tokens.

    batches: one document per row, padded at its end. Positions with the label IGNORED_LABEL are skipped.
    parent: the inputs of the parent's head, and the head. None gives a KL of 0.
    logits: how many exist at one time, at most (but at least those of one position).
    """
    head, loss, kl, tokens = model.get_output_embeddings().weight, 0.0, 0.0, 0
    for batch in batches:
        labels, states = batch.labels.flatten(), head_inputs(model, batch.input_ids).flatten(0, 1)
        of_parent = None if parent is None else parent[0](batch).flatten(0, 1)
        for start in range(0, len(labels), step := max(1, logits // len(head))):
            part = slice(start, start + step)
            logprobs = _logprobs(states[part], head)
            loss += F.nll_loss(logprobs, labels[part], ignore_index=IGNORED_LABEL, reduction="sum").item()
            if of_parent is not None:
                expected = _logprobs(of_parent[part], parent[1])
                divergence = (expected.exp() * (expected - logprobs)).sum(-1)
                kl += divergence.where(labels[part] != IGNORED_LABEL, 0).sum().item()
        tokens += int((labels != IGNORED_LABEL).sum())
    return loss, kl, tokens


def _logprobs(states: Tensor, head: Tensor) -> Tensor:
    return F.linear(states, head).float().log_softmax(-1)


def held_out_scores(section: Evaluate, data: TokenData, model, parent) -> dict:
    """Loss and KL in nats per token and bits per byte, for every held-out source and for all sources together.

    parent: a transformers model, a `CachedTeacher`, or None.

    KL is given for all sources together only. `tokens` is the number of predicted tokens: of a conversation only those
    that are trained, such as the assistant's. Bits per byte are of the sources of text, in which all tokens are
    predicted; without such a source there are none. Raises UserError for a source without a token to predict.
    """
    scores, totals, of_text = {}, [0.0, 0.0, 0], [0.0, 0.0]
    for source in section.held_out:
        loss, kl, tokens = _sums(section, data, model, parent, source, section.sequence_length)
        totals = [total + value for total, value in zip(totals, (loss, kl, tokens), strict=True)]
        scores |= {f"loss_{source}": loss / tokens, f"tokens_{source}": tokens}
        if is_text(data, source):
            num_bytes = tokens * data.bytes_per_token(source, "held_out")
            of_text = [of_text[0] + loss, of_text[1] + num_bytes]
            scores[f"bits_per_byte_{source}"] = loss / math.log(2) / num_bytes
    if of_text[1]:
        scores["bits_per_byte"] = of_text[0] / math.log(2) / of_text[1]
    loss, kl, tokens = totals
    return scores | {"loss": loss / tokens, "kl_to_parent": kl / tokens, "tokens": tokens}


def scores_at_lengths(section: Evaluate, data: TokenData, model) -> dict[str, dict]:
    """Sequence length → loss in nats per token and number of tokens, over all held-out sources.

    The lengths are those of the section that differ from its `sequence_length`.
    """
    found = {}
    for length in section.lengths or ():
        if length != section.sequence_length:
            sums = [_sums(section, data, model, None, source, length) for source in section.held_out]
            loss, _, tokens = map(sum, zip(*sums, strict=True))
            found[str(length)] = {"loss": loss / tokens, "tokens": tokens}
    return found


def write_teacher(section: Evaluate, data: TokenData, model, location: str) -> None:
    """Write what a `CachedTeacher` at `location` needs of a parent for `held_out_scores`."""
    write_head(model, location)
    for source in section.held_out:
        length = section.sequence_length

        def work(batch_size: int, source: str = source, length: int = length) -> None:
            write_states(model, _batches(section, data, model, source, length, batch_size), location, source, length)

        fitting(section.batch_size, model.device, _guess(model, length), work)


def _sums(section: Evaluate, data: TokenData, model, parent, source: str, length: int) -> tuple[float, float, int]:
    """See `text_scores`, for one source in sequences of `length`."""

    def work(batch_size: int) -> tuple[float, float, int]:
        batches = _batches(section, data, model, source, length, batch_size)
        if parent is None:
            return text_scores(model, None, batches)
        teacher = parent if isinstance(parent, CachedTeacher) else LiveTeacher(parent)
        return text_scores(model, (teacher.states(source, length), teacher.head), batches)

    found = fitting(section.batch_size, model.device, _guess(model, length), work)
    if found[2] == 0:
        raise UserError(
            f"evaluate.held_out: {source} has no trained token in the first {length} tokens of its documents; raise "
            "evaluate.sequence_length (or that one of evaluate.lengths) or evaluate.max_tokens"
        )
    return found


def _batches(section: Evaluate, data: TokenData, model, source: str, length: int, batch_size: int) -> Iterator[Batch]:
    for batch in held_out_batches(data, source, length, batch_size, section.max_tokens):
        yield batch.to(model.device)


def _guess(model, length: int) -> int:
    return first_batch_size(model.device, length, model.config.vocab_size)


def is_text(data: TokenData, source: str) -> bool:
    """Whether all held-out tokens of a source are predicted, as in text. In conversations only a part is."""
    return data.trained(source, "held_out") is None


def first_tokens(data: TokenData, source: str, number: int) -> Tensor:
    """The first `number` tokens of the first held-out document that has so many, else of the longest: (1, L) int64."""
    tokens, offsets = data.tokens(source, "held_out"), data.offsets(source, "held_out")
    lengths = np.diff(offsets)
    document = int(np.argmax(np.minimum(lengths, number)))  # the first of the largest
    start = offsets[document]
    return torch.from_numpy(tokens[start : start + min(number, lengths[document])].astype(np.int64))[None]


def count_parameters(model) -> dict[str, int]:
    """Parameters of a model that transformers loaded, including stored buffers (the routers of experts have some).

    A model with experts also gets `num_active_parameters`: the parameters that one token uses.
    """
    stored = model.state_dict().keys()
    total = sum(parameter.numel() for parameter in model.parameters())
    total += sum(buffer.numel() for name, buffer in model.named_buffers() if name in stored)
    expert_parameters = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    if expert_parameters == 0:
        return {"num_parameters": total}
    used = expert_parameters * model.config.num_experts_per_tok // model.config.n_routed_experts
    return {"num_parameters": total, "num_active_parameters": total - expert_parameters + used}
