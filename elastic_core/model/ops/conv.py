"""Causal depthwise convolution over positions."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None = None) -> Tensor:
    """silu(bias + Σ_k weight[:, k]·x_{t−K+1+k}), per channel. x (B, L, C), weight (C, 1, K), bias (C,) → (B, L, C).

    `starts` (N,) int64: positions in x.flatten(0, 1), other than those with t = 0, before which the sum does not reach.
    """
    return F.silu(causal_conv(x, weight, bias, starts))


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None = None) -> Tensor:
    """As `causal_conv_silu`, without silu.

    It is a sum of K shifted products. torch's convolution would need a transpose to (B, C, L) and back.
    """
    return _CausalConv.apply(x, weight, bias, starts)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, starts):
        ctx.save_for_backward(x, weight, starts)
        taps, length = _taps(weight), x.shape[1]
        y = x * taps[0] if bias is None else torch.addcmul(bias, x, taps[0])
        x = x if starts is None else x.clone(memory_format=torch.contiguous_format)
        for lag in range(1, min(len(taps), length)):
            _clear_before(x, starts, lag)
            y[:, lag:].addcmul_(x[:, : length - lag], taps[lag])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, starts = ctx.saved_tensors
        taps, length = _taps(weight), x.shape[1]
        grad_x, grad_taps = grad * taps[0], torch.zeros_like(taps)
        grad_taps[0] = (grad * x).sum((0, 1))
        grad_bias = grad.sum((0, 1)) if ctx.needs_input_grad[2] else None
        grad = grad if starts is None else grad.clone(memory_format=torch.contiguous_format)
        for lag in range(1, min(len(taps), length)):
            _clear_from(grad, starts, lag)
            grad_x[:, : length - lag].addcmul_(grad[:, lag:], taps[lag])
            grad_taps[lag] = (grad[:, lag:] * x[:, : length - lag]).sum((0, 1))
        return grad_x, grad_taps.flip(0).T.unsqueeze(1), grad_bias, None


# With lag k, a document must not read the k positions before its start. These two clear one position more for each
# lag, so after lag k they have cleared k of them. A position beyond the end of the row would be another row's; the one
# at the end of the row is cleared instead, which this lag and all later ones must not use either.


def _clear_before(x: Tensor, starts: Tensor | None, lag: int) -> None:
    """Set the inputs to 0 that stand `lag` positions before a start, in x (B, L, C), in place."""
    if starts is not None:
        first = starts - starts % x.shape[1]  # of the row
        x.view(-1, x.shape[2]).index_fill_(0, torch.maximum(starts - lag, first), 0)


def _clear_from(grad: Tensor, starts: Tensor | None, lag: int) -> None:
    """Set the gradients to 0 of the `lag`-th position of a document, in grad (B, L, C), in place."""
    if starts is not None:
        last = starts - starts % grad.shape[1] + grad.shape[1] - 1  # of the row
        grad.view(-1, grad.shape[2]).index_fill_(0, torch.minimum(starts + lag - 1, last), 0)


def _taps(weight: Tensor) -> Tensor:
    """(C, 1, K) → (K, C), reversed: row i is the weight of the input i positions earlier."""
    return weight.squeeze(1).T.flip(0).contiguous()
