"""Causal depthwise convolution over positions."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(bias + Σ_k weight[:, k]·x_{t−K+1+k}), per channel. x (B, L, C), weight (C, 1, K), bias (C,) → (B, L, C)."""
    return F.silu(causal_conv(x, weight, bias))


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `causal_conv_silu`, without silu.

    It is a sum of K shifted products. torch's convolution would need a transpose to (B, C, L) and back.
    """
    return _CausalConv.apply(x, weight, bias)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        taps, length = _taps(weight), x.shape[1]
        y = x * taps[0] if bias is None else torch.addcmul(bias, x, taps[0])
        for lag in range(1, min(len(taps), length)):
            y[:, lag:].addcmul_(x[:, : length - lag], taps[lag])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        taps, length = _taps(weight), x.shape[1]
        grad_x, grad_taps = grad * taps[0], torch.zeros_like(taps)
        grad_taps[0] = (grad * x).sum((0, 1))
        for lag in range(1, min(len(taps), length)):
            grad_x[:, : length - lag].addcmul_(grad[:, lag:], taps[lag])
            grad_taps[lag] = (grad[:, lag:] * x[:, : length - lag]).sum((0, 1))
        grad_bias = grad.sum((0, 1)) if ctx.needs_input_grad[2] else None
        return grad_x, grad_taps.flip(0).T.unsqueeze(1), grad_bias


def _taps(weight: Tensor) -> Tensor:
    """(C, 1, K) → (K, C), reversed: row i is the weight of the input i positions earlier."""
    return weight.squeeze(1).T.flip(0).contiguous()
