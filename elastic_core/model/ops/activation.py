"""The activation functions of MLPs by their names in transformers; and relu(x)², which `nemotron_h` has."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)². The backward pass reads memory less often than the backward passes of relu and square."""
    return _ReluSquared.apply(x)


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (positive,) = ctx.saved_tensors
        return (grad * positive).mul_(2)


OWN = {"relu2": relu_squared, "silu": F.silu}  # of almost all models; the import of transformers' table takes a second


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function that transformers has under this name."""
    return OWN[name] if name in OWN else _all_activations()[name]


def activation_requirement(key: str, name: str) -> tuple[bool, str]:
    """The condition that `name`, the value of `key` in a configuration, is known: (holds, message if it does not)."""
    if name in OWN:
        return True, ""
    known = _all_activations()
    return name in known, f"{key}={name!r}; allowed: {', '.join(sorted(known))}"


def _all_activations():
    from transformers.activations import ACT2FN  # imported here because the import is slow

    return ACT2FN
