"""RMS norms that divide by the number of live channels. A slice or a gate can lower this number."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm_naive(x: Tensor, weight: Tensor, eps: float, num_live: int | Tensor) -> Tensor:
    """weight · x / sqrt(Σx²/num_live + eps) over the last dimension. x (..., H), weight (H,)."""
    return weight * (x * torch.rsqrt(x.square().sum(-1, keepdim=True) / num_live + eps))


def rms_norm(x: Tensor, weight: Tensor, eps: float, num_live: int | Tensor) -> Tensor:
    """As `rms_norm_naive`, but computed in float32 or higher and returned in the type of `x`.

    `num_live` is H for a slice. If x is multiplied by a gate, `num_live` is the sum of the gate (eq. 25): channels with
    gate 0 must not count.
    """
    return group_rms_norm(x, weight, eps, 1, num_live)


def group_rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int, num_live: int | Tensor) -> Tensor:
    """`rms_norm` over each of `groups` equal parts of the last dimension; `num_live` is the number in one group."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if isinstance(num_live, Tensor):
        num_live = num_live.to(wide)
    grouped = x.reshape(-1, groups, x.shape[-1] // groups).to(wide)
    return _RMSNorm.apply(grouped, weight.to(wide).view(groups, -1), eps, num_live).view(x.shape).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """x (T, G, K), weight (G, K). Its own backward pass reads x about half as often as that of autograd."""

    @staticmethod
    def forward(ctx, x, weight, eps, num_live):
        squares = torch.linalg.vector_norm(x, dim=-1).square_()  # (T, G)
        inverse = torch.rsqrt(squares / num_live + eps)
        live = num_live if isinstance(num_live, Tensor) else None
        ctx.save_for_backward(x, weight, inverse, None if live is None else squares, live)
        ctx.num_live = num_live if live is None else None
        return (x * inverse[..., None]).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, inverse, squares, live = ctx.saved_tensors
        by_group = (grad * x).transpose(0, 1)  # (G, T, K)
        grad_weight = (inverse.T.unsqueeze(1) @ by_group).squeeze(1)
        dots = (by_group @ weight.unsqueeze(2)).squeeze(2).T  # (T, G): Σ grad·weight·x
        slope = dots * inverse**3 / (ctx.num_live if live is None else live)
        grad_x = (grad * weight).mul_(inverse[..., None])
        grad_x.addcmul_(x, slope[..., None], value=-1)
        grad_live = None if live is None else (slope * squares).sum() / (2 * live)
        return grad_x, grad_weight, None, grad_live
