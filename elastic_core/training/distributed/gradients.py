"""Gradients of sharded parameters (DTensor) and of whole ones: average them over ranks, measure and clip their norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from elastic_core.training.distributed.ranks import Ranks


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor. A tensor that is not sharded is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from the shards of all ranks. All ranks have to call this together.

    Shards in CPU memory are copied to the ranks' device first, because NCCL gathers on GPUs only.
    """
    return tensor.to(tensor.device_mesh.device_type).full_tensor() if isinstance(tensor, DTensor) else tensor


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
    """The 2-norm () of all `gradients` together. They may be sharded, whole or both, and shards may be in CPU memory.

    It is on the ranks' device, or for whole gradients alone on theirs.
    """
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    plain = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norms = [norm(part) for norm, part in ((_norm_of_sharded, sharded), (nn.utils.get_total_norm, plain)) if part]
    if not norms:
        return torch.zeros(())
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def _norm_of_sharded(gradients: list[Tensor]) -> Tensor:
    if local(gradients[0]).device.type == gradients[0].device_mesh.device_type:
        return whole(nn.utils.get_total_norm(gradients))
    return norm_of_offloaded(gradients)


def norm_of_offloaded(gradients: list[DTensor]) -> Tensor:
    """The 2-norm () of sharded gradients with shards in CPU memory, on the ranks' device. NCCL sums on GPUs only."""
    mesh = gradients[0].device_mesh
    total = nn.utils.get_total_norm([local(gradient) for gradient in gradients]).square().to(mesh.device_type)
    dist.all_reduce(total, group=mesh.get_group("shard"))
    return total.sqrt()


def clip_gradients(gradients: list[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale `gradients` in place so that their 2-norm is at most `max_norm`.

    `norm` is their norm (see `gradient_norm`), as a tensor: the process does not wait for its value.
    """
    scale, by_device = (max_norm / (norm + 1e-6)).clamp(max=1.0), {}
    for gradient in map(local, gradients):  # shards in CPU memory, and whole gradients on the GPU
        by_device.setdefault(gradient.device, []).append(gradient)
    for device, found in by_device.items():
        torch._foreach_mul_(found, scale.to(device))
