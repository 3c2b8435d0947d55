"""A stand-in for causal_conv1d, which is CUDA code: the checks of its extension, and the same sums by torch."""

import sys
import types

import torch
import torch.nn.functional as F
from torch import Tensor


def _check(x: Tensor, weight: Tensor, seq_idx: Tensor | None) -> None:
    """What the extension checks of an input (B, C, L)."""
    is_channel_last = x.stride(1) == 1 and x.stride(2) > 1
    assert seq_idx is None or is_channel_last, "seq_idx is only supported for channel last layout"
    assert x.stride(2) == 1 or x.stride(1) == 1, x.stride()
    if is_channel_last:
        assert x.shape[1] % 8 == 0, f"{x.shape[1]} channels"
        assert x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0, f"strides {x.stride()}"
        assert x.storage_offset() % 8 == 0, "reads of 16 bytes"
    assert weight.shape[1] in (2, 3, 4)


def _compute(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool) -> Tensor:
    taps, length = weight.shape[1], x.shape[2]
    total = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for lag in range(min(taps, length)):
        earlier = F.pad(x, (lag, 0))[:, :, :length] * weight[:, taps - 1 - lag, None]
        if seq_idx is not None and lag:
            earlier = earlier * (F.pad(seq_idx, (lag, 0), value=-1)[:, :length] == seq_idx)[:, None]
        total = total + earlier
    total = total if bias is None else total + bias[:, None]
    return (F.silu(total) if silu else total).to(x.dtype)


def _channel_last(y: Tensor) -> Tensor:
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def forward(x, weight, bias, seq_idx, initial_states, final_states_out, silu):
    _check(x, weight, seq_idx)
    assert initial_states is None and final_states_out is None
    return _channel_last(_compute(x, weight, bias, seq_idx, silu))


def backward(x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu):
    _check(x, weight, seq_idx)
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (x, weight, *([] if bias is None else [bias]))]
        y = _compute(inputs[0], inputs[1], inputs[2] if bias is not None else None, seq_idx, silu)
        found = torch.autograd.grad(y, inputs, dout)
    if dx is not None:
        dx.copy_(found[0])
    return found[0] if dx is None else dx, found[1], found[2] if bias is not None else None, None


def function(x, weight, bias=None, seq_idx=None, activation=None):
    """causal_conv1d_fn: differentiable."""
    _check(x, weight, seq_idx)
    return _channel_last(_compute(x, weight, bias, seq_idx, activation == "silu"))


def allocate_forward(x, weight, bias, seq_idx, initial_states, final_states_out, silu):
    """What `forward` allocates on a GPU, without the sums."""
    _check(x, weight, seq_idx)
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def allocate_backward(x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu):
    """What `backward` allocates on a GPU, without the sums."""
    _check(x, weight, seq_idx)
    return dx, torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias), None


def install(computes: bool = True) -> None:
    """Put it in the place of the package."""
    package, functions = types.ModuleType("causal_conv1d"), types.ModuleType("causal_conv1d.cpp_functions")
    package.causal_conv1d_fn, package.__path__ = function, []
    found = (forward, backward) if computes else (allocate_forward, allocate_backward)
    functions.causal_conv1d_fwd_function, functions.causal_conv1d_bwd_function = found
    functions.causal_conv1d_update_function = None
    package.cpp_functions = functions
    sys.modules |= {"causal_conv1d": package, "causal_conv1d.cpp_functions": functions}
