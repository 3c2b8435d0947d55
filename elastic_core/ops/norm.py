"""RMS norms that divide by the number of live channels, which a slice or a gate may lower."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, num_live: int | Tensor) -> Tensor:
    """weight · x / sqrt(Σx²/num_live + eps) over the last dimension, in float32. x (..., H), weight (H,).

    `num_live` is H for a slice, the sum of the gate (eq. 25) for gated x, whose dead channels are zero.
    """
    dtype, x = x.dtype, x.float() if x.dtype != torch.float64 else x
    variance = x.square().sum(-1, keepdim=True) / num_live
    return (weight.to(x.dtype) * (x * torch.rsqrt(variance + eps))).to(dtype)


def group_rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int, num_live: int | Tensor) -> Tensor:
    """`rms_norm` over each of `groups` equal parts of the last dimension; `num_live` counts one group's channels."""
    dtype = x.dtype
    grouped = x.unflatten(-1, (groups, -1))
    return rms_norm(grouped, weight.view(groups, -1), eps, num_live).flatten(-2).to(dtype)
