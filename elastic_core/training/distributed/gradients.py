"""Gradients and tensors of sharded and whole parameters: averaging, norms, clipping."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from elastic_core.training.distributed.ranks import Ranks


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its shard, or all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from its shards; every rank has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def average_gradients(modules: Iterable[nn.Module], ranks: Ranks) -> None:
    """Average what FSDP does not: gradients of whole parameters, which all ranks have for the same ones."""
    if not ranks.is_distributed:
        return
    buckets: dict[str, list[Tensor]] = {}
    for module in modules:
        for parameter in module.parameters():
            if parameter.grad is not None and not isinstance(parameter, DTensor):
                buckets.setdefault(parameter.device.type, []).append(parameter.grad)
    for gradients in buckets.values():
        flat = ranks.sum(torch.cat([gradient.flatten() for gradient in gradients])) / ranks.world
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of gradients together, of shards and whole ones, as a plain tensor."""
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    plain = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norms = [whole(nn.utils.get_total_norm(part)) for part in (sharded, plain) if part]
    if not norms:
        return torch.zeros(())
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def clip_gradients(gradients: list[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale gradients of 2-norm `norm` (see `gradient_norm`) down to `max_norm`, in place; without a wait for it."""
    if gradients:
        torch._foreach_mul_([local(gradient) for gradient in gradients], (max_norm / (norm + 1e-6)).clamp(max=1.0))
