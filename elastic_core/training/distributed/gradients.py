"""Gradients of sharded parameters (DTensor) and of whole ones: average them over ranks, measure and clip their norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from elastic_core.training.distributed.ranks import Ranks


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor. A tensor that is not sharded is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from the shards of all ranks. All ranks have to call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def average_gradients(modules: Iterable[nn.Module], ranks: Ranks) -> None:
    """Average over ranks, in place, the gradients that FSDP does not average: those of whole parameters.

    All ranks have gradients for the same parameters, because they train the same budgets. So one message per device
    type is enough.
    """
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
    """The 2-norm () of all `gradients` together. They may be sharded, whole or both."""
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    plain = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norms = [whole(nn.utils.get_total_norm(part)) for part in (sharded, plain) if part]
    if not norms:
        return torch.zeros(())
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def clip_gradients(gradients: list[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale `gradients` in place so that their 2-norm is at most `max_norm`.

    `norm` is their norm (see `gradient_norm`), as a tensor: the process does not wait for its value.
    """
    if gradients:
        torch._foreach_mul_([local(gradient) for gradient in gradients], (max_norm / (norm + 1e-6)).clamp(max=1.0))
