"""Losses (eqs. 12–17), computed from hidden states in chunks of tokens, so that logits never exist whole."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from elastic_core.data import IGNORED_LABEL as IGNORED  # the label of a position that takes no part

CHUNK = 1024  # tokens whose logits exist at a time


def chunked_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """Summed next-token cross-entropy in nats, forward only. hidden (T, H), head (V, H), labels (T,) → ()."""
    total = hidden.new_zeros((), dtype=torch.float64)
    for h, y in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        logits = F.linear(h, head)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total += F.cross_entropy(logits, y, ignore_index=IGNORED, reduction="sum")
    return total


class DistillationLoss(torch.autograd.Function):
    """α·CE + β·T²·KL(teacher ‖ student), averaged over positions with a label.

    Gradients with respect to the student's hidden states and head are formed chunk by chunk in the forward pass,
    where the logits are at hand, and only scaled in the backward pass.
    """

    @staticmethod
    def forward(ctx, hidden, head, labels, teacher, ce_weight, kl_weight, temperature, chunk, num_live):
        if num_live is None:
            num_live = (labels != IGNORED).sum().clamp(min=1)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=wide)
        sums = hidden.new_zeros(2, dtype=torch.float64)  # CE, KL
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            teacher_logits = None if teacher is None else F.linear(teacher[0][part], teacher[1]).to(wide)
            logits = F.linear(hidden[part], head).to(wide)
            grad, ce, kl = _chunk_loss(logits, labels[part], teacher_logits, ce_weight, kl_weight, temperature)
            grad = (grad / num_live).to(hidden.dtype)
            grad_hidden[part] = grad @ head
            grad_head += (grad.T @ hidden[part]).to(wide)
            sums += torch.stack([ce, kl]).double()
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


def _chunk_loss(logits, labels, teacher_logits, ce_weight, kl_weight, temperature):
    """Gradient of the summed loss with respect to logits (t, V), and the chunk's summed CE and KL."""
    live = labels != IGNORED
    safe = labels.where(live, 0)
    logprobs = logits.log_softmax(-1)
    ce = -(logprobs.gather(-1, safe[:, None]).squeeze(-1) * live).sum()
    grad = torch.zeros_like(logits)
    if ce_weight:
        grad += ce_weight * logprobs.exp()
        grad.scatter_add_(-1, safe[:, None], torch.full_like(grad[:, :1], -ce_weight))
    kl = torch.zeros_like(ce)
    if teacher_logits is not None:
        if temperature != 1:
            logprobs = (logits / temperature).log_softmax(-1)
        teacher_logprobs = (teacher_logits / temperature).log_softmax(-1)
        probs = teacher_logprobs.exp()
        kl = ((probs * (teacher_logprobs - logprobs)).sum(-1) * live).sum()
        if kl_weight:
            grad += (kl_weight * temperature) * (logprobs.exp() - probs)  # T² from the loss, 1/T from the logits
    return grad * live[:, None], ce, kl


def distillation_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    teacher: tuple[Tensor, Tensor] | None = None,
    ce_weight: float = 0.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    chunk: int = CHUNK,
    num_live: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """ce_weight·CE + kl_weight·T²·KL(p_teacher ‖ p_student) per position (eqs. 13–15); returns (loss, CE, KL).

    hidden (..., H) and head (V, H) of the student; labels (...), IGNORED where a position takes no part; `teacher` its
    hidden states (..., H') and head (V, H'), never differentiated; CE at temperature 1, KL at `temperature`, in nats,
    both detached. `num_live` () is what to divide by instead of the number of positions that take part: where other
    processes hold more of them.
    """
    if teacher is not None:
        teacher = teacher[0].detach().flatten(0, -2), teacher[1].detach()
    elif kl_weight:
        raise ValueError("kl_weight: distillation needs a teacher; pass one, or set kl_weight to 0")
    return DistillationLoss.apply(
        hidden.flatten(0, -2), head, labels.flatten(), teacher, ce_weight, kl_weight, temperature, chunk, num_live
    )


def resource_loss(cost: Tensor, target: float, dead_zone: float = 0.0) -> Tensor:
    """|C/Ĉ − 1| (eq. 12), zero within `dead_zone` of the target. cost () expected, target in the same unit."""
    return (cost / target - 1).abs().sub(dead_zone).clamp(min=0)
