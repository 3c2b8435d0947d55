"""Context parallelism: several workers share every sequence, each with an equal part of its positions."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from elastic_core.config import ConfigError
from elastic_core.model.ops.parts import Part
from elastic_core.training.distributed.ranks import Ranks

# torch 2.13 has new names for these two.
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def make_part(ranks: Ranks, size: int) -> Part | None:
    """This rank's part of the sequences that `size` ranks in a row share; None for 1.

    All ranks call this together. Raises ConfigError if `size` does not divide the number of ranks.
    """
    if size == 1:
        return None
    if ranks.world % size:
        allowed = f"divisors of the number of workers ({ranks.world})"
        raise ConfigError(f"context_parallel: got {size}; allowed: {allowed}")
    group = None
    for first in range(0, ranks.world, size):  # every rank has to make all groups
        made = dist.new_group(list(range(first, first + size)))
        if first <= ranks.rank < first + size:
            group = made
    return Part(ranks.rank % size, size, lambda x: Gather.apply(x, group, size))


class Gather(torch.autograd.Function):
    """x of this rank → those of all ranks of a group, (size, ...). The gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup, size: int) -> Tensor:
        ctx.group = group
        gathered = x.new_empty(size * x.numel())
        _gather(gathered, x.contiguous().view(-1), group=group)
        return gathered.view(size, *x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        own = grad.new_empty(grad[0].numel())
        _reduce_scatter(own, grad.contiguous().view(-1), group=ctx.group)
        return own.view(grad.shape[1:]), None, None
