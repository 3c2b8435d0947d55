"""Copies from CPU memory to a GPU for which the process does not wait.

An ordinary `tensor.to("cuda")` returns when the GPU has done everything that was asked of it before. In a training step
the GPU then stands still until the process has asked for more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; if it is in CPU memory and the device is a GPU, without waiting for the GPU.

    If the tensor needs a gradient, the backward pass does wait for it (see `DeviceGates` in training/routing.py).
    """
    if tensor.device.type != "cpu" or device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def all_to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one type on `device`: for a GPU one copy, of which the results are views."""
    if device.type != "cuda" or not tensors:
        return [tensor.to(device) for tensor in tensors]
    packed = to_device(torch.cat([tensor.flatten() for tensor in tensors]), device)
    parts = packed.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
