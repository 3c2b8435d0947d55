"""Causal depthwise convolution over positions."""

import torch.nn.functional as F
from torch import Tensor


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y_t = bias + Σ_k weight[:, k]·x_{t−K+1+k}, per channel. x (B, L, C), weight (C, 1, K), bias (C,) → (B, L, C)."""
    kernel_size, length = weight.shape[-1], x.shape[1]
    padded = F.pad(x, (0, 0, kernel_size - 1, 0))
    y = padded[:, :length] * weight[:, 0, 0]
    for k in range(1, kernel_size):  # a few shifted products; no transpose to (B, C, L) and back
        y = y + padded[:, k : k + length] * weight[:, 0, k]
    return y if bias is None else y + bias
