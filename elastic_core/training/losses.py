"""Losses (eqs. 12–17), computed from hidden states in chunks of tokens, so that logits never exist whole."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from elastic_core.data.loader import IGNORED_LABEL as IGNORED
from elastic_core.errors import UserError

CHUNK = 1024  # tokens whose logits exist at a time, at most
# With a large vocabulary fewer, down to what still fills matrix products: 64 MB of float32 logits, where they suffice.
SMALLEST, ENTRIES = 512, 2**24


class DistillationLoss(torch.autograd.Function):
    """α·CE + β·T²·KL(teacher ‖ student), averaged over positions with a label.

    Gradients with respect to the student's hidden states and head are formed chunk by chunk in the forward pass,
    where the logits are at hand, and only scaled in the backward pass. Three matrices (chunk, vocabulary) exist at a
    time. The mean over live positions is taken on the side of the hidden states, which is the smaller one.
    """

    @staticmethod
    def forward(ctx, hidden, head, labels, teacher, ce_weight, kl_weight, temperature, chunk, num_live):
        live = labels != IGNORED
        if num_live is None:
            num_live = live.sum().clamp(min=1)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=wide)
        shares = (live.to(wide) / num_live)[:, None]  # (T, 1)
        sums = hidden.new_zeros(2, dtype=torch.float64)  # CE, KL
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            student = _log_softmax(F.linear(hidden[part], head).to(wide), 1.0 if teacher is None else temperature)
            teacher_logits = None if teacher is None else F.linear(teacher[0][part], teacher[1]).to(wide)
            grad, ce, kl = _chunk_loss(student, labels[part], teacher_logits, ce_weight, kl_weight, temperature)
            del student, teacher_logits
            grad = grad.to(hidden.dtype)
            grad_hidden[part] = (grad @ head) * shares[part]
            scaled = (hidden[part] * shares[part]).to(hidden.dtype)
            if hidden.dtype == head.dtype == wide:
                grad_head.addmm_(grad.T, scaled)
            else:
                grad_head += (grad.T @ scaled).to(wide)
            sums += torch.stack([ce, kl]).double()
            del grad  # before the next chunk's matrices are there
        ctx.save_for_backward(grad_hidden, grad_head.to(head.dtype))
        ce, kl = (sums / num_live).to(wide)
        loss = ce_weight * ce + kl_weight * temperature**2 * kl
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_head * grad_loss, *(None,) * 7


def _log_softmax(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities at temperature 1 and at `temperature`, the same tensor where they are the same."""
    logprobs = logits.log_softmax(-1)
    return logprobs, logprobs if temperature == 1 else (logits / temperature).log_softmax(-1)


def _chunk_loss(student, labels, teacher_logits, ce_weight, kl_weight, temperature):
    """Gradient with respect to logits (t, V) of every row's loss, and the chunk's summed CE and KL over live rows.

    `student`: log-probabilities at temperature 1 and at `temperature`. Works in place: what it is given is the caller's
    own, and holds other values afterwards.
    """
    live = labels != IGNORED
    safe = labels.where(live, 0)[:, None]
    logprobs, tempered = student
    ce = -(logprobs.gather(-1, safe).squeeze(-1) * live).sum()
    if teacher_logits is None:
        kl, grad = torch.zeros_like(ce), logprobs.exp_().mul_(ce_weight)
    else:
        if temperature != 1:
            teacher_logits /= temperature
        difference = teacher_logits.log_softmax(-1)
        probs = torch.exp(difference, out=teacher_logits)
        kl = (difference.sub_(tempered).mul_(probs).sum(-1) * live).sum()
        factor = kl_weight * temperature  # T² from the loss, 1/T from the logits
        if ce_weight and tempered is logprobs:
            grad = logprobs.exp_().mul_(ce_weight + factor).sub_(probs, alpha=factor)
        else:
            grad = tempered.exp_().sub_(probs).mul_(factor)  # exactly zero for a student that equals its teacher
            if ce_weight:
                grad.add_(logprobs.exp_(), alpha=ce_weight)
    if ce_weight:
        grad.scatter_add_(-1, safe, torch.full_like(grad[:, :1], -ce_weight))
    return grad, ce, kl


def distillation_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    teacher: tuple[Tensor, Tensor] | None = None,
    ce_weight: float = 0.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    chunk: int | None = None,
    num_live: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """ce_weight·CE + kl_weight·T²·KL(p_teacher ‖ p_student) per position (eqs. 13–15); returns (loss, CE, KL).

    hidden (..., H) and head (V, H) of the student; labels (...), IGNORED where a position takes no part; `teacher` its
    hidden states (..., H') and head (V, H'), never differentiated; CE at temperature 1, KL at `temperature`, in nats,
    both detached. `chunk`: tokens whose logits exist at a time (None: as `CHUNK` says). `num_live` () is what to divide
    by instead of the number of positions that take part: where other processes hold more of them.
    """
    if teacher is not None:
        teacher = teacher[0].detach().flatten(0, -2), teacher[1].detach()
    elif kl_weight:
        raise UserError("kl_weight: distillation needs a teacher; pass one, or set kl_weight to 0")
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    chunk = chunk or min(CHUNK, max(SMALLEST, ENTRIES // len(head)))
    return DistillationLoss.apply(hidden, head, labels, teacher, ce_weight, kl_weight, temperature, chunk, num_live)


def resource_loss(cost: Tensor, target: float, dead_zone: float = 0.0) -> Tensor:
    """|C/Ĉ − 1| (eq. 12), zero within `dead_zone` of the target. cost () expected, target in the same unit."""
    return (cost / target - 1).abs().sub(dead_zone).clamp(min=0)
