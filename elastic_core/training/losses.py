"""Losses (eqs. 12–17). The task loss is computed in chunks of tokens: the logits of all tokens never exist at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from elastic_core.data.loader import IGNORED_LABEL as IGNORED
from elastic_core.errors import UserError

# Tokens per chunk. With a large vocabulary a chunk is smaller, so that its logits have about LOGITS_PER_CHUNK entries
# (64 MiB in float32). Below MIN_CHUNK tokens, matrix products would be too small to be efficient.
CHUNK, MIN_CHUNK, LOGITS_PER_CHUNK = 1024, 512, 2**24


class KeptLogits(NamedTuple):
    """What a teacher says about positions: its k most probable tokens, and all others as one class.

    `ids` (..., k) int64; `logprobs` (..., k + 1), at the temperature of the loss: those of the ids, then the rest's.
    """

    ids: Tensor
    logprobs: Tensor

    def flatten(self) -> KeptLogits:
        return KeptLogits(*(tensor.flatten(0, -2) for tensor in self))

    def as_logprobs(self, part: slice, student: Tensor) -> Tensor:
        """Log-probabilities (t, V) for the positions `part`; `student` (t, V) are its own at the same temperature.

        The mass of the rest is spread over its tokens as the student spreads its own. Then the KL to the student over
        all tokens is the KL over the k tokens and one class for the rest, and so are its gradients.
        """
        ids, logprobs = self.ids[part], self.logprobs[part].to(student.dtype)
        filled = student.scatter(-1, ids, -torch.inf)
        filled += logprobs[:, -1:] - filled.logsumexp(-1, keepdim=True)
        return filled.scatter_(-1, ids, logprobs[:, :-1])


class DistillationLoss(torch.autograd.Function):
    """ce_weight·CE + kl_weight·T²·KL(teacher ‖ student), averaged over the positions that have a label (eqs. 13–15).

    The forward pass also computes the gradients of the student's hidden states and head, chunk by chunk, because it
    has the logits. The backward pass only scales them. At most three matrices (chunk, vocabulary) exist at a time. To
    take the mean, hidden states are scaled and not logits, because hidden states are smaller.
    """

    @staticmethod
    def forward(ctx, hidden, head, labels, teacher, ce_weight, kl_weight, temperature, chunk, num_labelled):
        labelled = labels != IGNORED
        if num_labelled is None:
            num_labelled = labelled.sum().clamp(min=1)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=wide)
        weights = (labelled.to(wide) / num_labelled)[:, None]  # (tokens, 1)
        sums = hidden.new_zeros(2, dtype=torch.float64)  # sums of CE and KL
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            student = _log_softmax(F.linear(hidden[part], head).to(wide), 1.0 if teacher is None else temperature)
            if isinstance(teacher, KeptLogits):
                teacher_logits = teacher.as_logprobs(part, student[1]).mul_(temperature)
            else:
                teacher_logits = None if teacher is None else F.linear(teacher[0][part], teacher[1]).to(wide)
            grad, ce, kl = _chunk_loss(student, labels[part], teacher_logits, ce_weight, kl_weight, temperature)
            del student, teacher_logits
            grad = grad.to(hidden.dtype)
            grad_hidden[part] = (grad @ head) * weights[part]
            scaled = (hidden[part] * weights[part]).to(hidden.dtype)
            if hidden.dtype == head.dtype == wide:
                grad_head.addmm_(grad.T, scaled)
            else:
                grad_head += (grad.T @ scaled).to(wide)
            sums += torch.stack([ce, kl]).double()
            del grad  # Free it before the next chunk allocates its matrices.
        ctx.save_for_backward(grad_hidden, grad_head.to(head.dtype))
        ce, kl = (sums / num_labelled).to(wide)
        loss = ce_weight * ce + kl_weight * temperature**2 * kl
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_head * grad_loss, *(None,) * 7


def _log_softmax(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probabilities at temperature 1, those at `temperature`). At temperature 1, both are the same tensor."""
    logprobs = logits.log_softmax(-1)
    return logprobs, logprobs if temperature == 1 else (logits / temperature).log_softmax(-1)


def _chunk_loss(student, labels, teacher_logits, ce_weight, kl_weight, temperature):
    """(gradient of each row's loss with respect to its logits (t, V), sum of CE (), sum of KL ()) of one chunk.

    The sums are over the rows that have a label. `student` is the result of `_log_softmax`, `teacher_logits` is (t, V)
    or None. This works in place and overwrites both.
    """
    labelled = labels != IGNORED
    safe_labels = labels.where(labelled, 0)[:, None]
    logprobs, tempered = student
    ce = -(logprobs.gather(-1, safe_labels).squeeze(-1) * labelled).sum()
    if teacher_logits is None:
        kl, grad = torch.zeros_like(ce), logprobs.exp_().mul_(ce_weight)
    else:
        if temperature != 1:
            teacher_logits /= temperature
        difference = teacher_logits.log_softmax(-1)
        probs = torch.exp(difference, out=teacher_logits)
        kl = (difference.sub_(tempered).mul_(probs).sum(-1) * labelled).sum()
        factor = kl_weight * temperature  # T² of the loss, times 1/T from the derivative of logits / T
        if ce_weight and tempered is logprobs:
            grad = logprobs.exp_().mul_(ce_weight + factor).sub_(probs, alpha=factor)
        else:
            grad = tempered.exp_().sub_(probs).mul_(factor)  # exactly zero if the student equals the teacher
            if ce_weight:
                grad.add_(logprobs.exp_(), alpha=ce_weight)
    if ce_weight:
        grad.scatter_add_(-1, safe_labels, torch.full_like(grad[:, :1], -ce_weight))
    return grad, ce, kl


def distillation_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    teacher: tuple[Tensor, Tensor] | KeptLogits | None = None,
    ce_weight: float = 0.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    chunk: int | None = None,
    num_labelled: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The task loss ce_weight·CE + kl_weight·T²·KL(p_teacher ‖ p_student), in nats per position (eqs. 13–15).

    - `hidden` (..., D), `head` (V, D): final hidden states and head of the student.
    - `labels` (...) int64; positions with IGNORED take no part.
    - `teacher`: (hidden states (..., D'), head (V, D')) of the teacher, or its kept logits. They get no gradient.
    - `temperature` T is that of the KL. CE has temperature 1.
    - `chunk`: number of tokens whose logits exist at a time (None: see `CHUNK`).
    - `num_labelled` (): the number to divide sums by (None: the number of positions here that have a label). Give it
      if other processes hold further positions of the same batch.

    Returns (loss, CE, KL), each (). CE and KL get no gradient. Raises UserError for a `kl_weight` without a teacher.
    """
    if isinstance(teacher, KeptLogits):
        teacher = teacher.flatten()
    elif teacher is not None:
        teacher = teacher[0].detach().flatten(0, -2), teacher[1].detach()
    elif kl_weight:
        raise UserError("kl_weight: distillation needs a teacher; pass one, or set kl_weight to 0")
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    chunk = chunk or min(CHUNK, max(MIN_CHUNK, LOGITS_PER_CHUNK // len(head)))
    return DistillationLoss.apply(hidden, head, labels, teacher, ce_weight, kl_weight, temperature, chunk, num_labelled)


def resource_loss(cost: Tensor, target: float, dead_zone: float = 0.0) -> Tensor:
    """L_router = max(0, |C/Ĉ − 1| − dead_zone), () (eq. 12; the dead zone is ours).

    `cost` () is the expected cost C, and `target` is Ĉ in the same unit.
    """
    return (cost / target - 1).abs().sub(dead_zone).clamp(min=0)
