"""Counts the bytes that code allocates, forward and backward, on tensors without storage."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import astuple, dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elastic_core.training.distributed.execution import Execution


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages, `now` and at the `peak`: those that operations inside the context have made.

    Storages that existed before do not count.
    """

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._see((args, kwargs), made=False)
        out = function(*args, **(kwargs or {}))
        self._see(out, made=True)
        return out

    def _see(self, values, made: bool) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and (key := value.untyped_storage()._cdata) not in self.sizes:
                storage = value.untyped_storage()
                self.sizes[key] = storage.nbytes() if made else 0
                self.now += self.sizes[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@dataclass(frozen=True)
class PieceMemory:
    """The bytes that a piece of a step allocates, without its weights.

    - `output`: its output.
    - `kept`: what stays from its forward pass to its backward pass. This includes its input, if it is needed again.
    - `forward`: the peak during the forward pass, with input and output.
    - `backward`: the peak during the backward pass, with `kept` and the gradients of output and input.
    - `gradients`: the gradients of its weights. They stay after the backward pass.
    """

    output: float
    kept: float
    forward: float
    backward: float
    gradients: float


@dataclass(frozen=True)
class TrainingSetting:
    """How a worker trains: the precision of the stage, and what `distributed.placement.place` does to the model.

    `distributed`: FSDP gathers the weights in the stage's precision. Without it, autocast converts them at each use.
    """

    precision: str = "float32"
    execution: Execution = field(default_factory=Execution)
    distributed: bool = False
    gpu: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The type of the activations."""
        return getattr(torch, self.precision)


def measure(
    piece: Callable[[Tensor], Tensor], source: Tensor, setting: TrainingSetting, weights: nn.Module
) -> PieceMemory:
    """Run `piece` on a copy of `source`, forward and backward, and count what it allocates.

    `weights` is the module whose gradients count. All tensors are fake or meta tensors.
    """
    with LiveBytes() as live:
        x = source.clone()  # not a leaf of the graph, like an input in the middle of a model
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setting.precision == "bfloat16"):
            y = piece(x)
        forward, output = live.peak, y.untyped_storage().nbytes()
        del x
        kept = live.now - output
        live.peak = live.now
        y.backward(torch.empty_like(y))
        gradients = [p.grad for p in weights.parameters() if p.grad is not None]
        return PieceMemory(
            output, kept, forward, live.peak - output, sum(g.untyped_storage().nbytes() for g in gradients)
        )


def extrapolate(count: Callable[[int], PieceMemory], length: int, lengths: tuple[int, int]) -> PieceMemory:
    """`count(length)`. Beyond the longer of the two `lengths`, the straight line through the counts at both."""
    short, long = lengths
    if length <= long:
        return count(length)
    low, high = astuple(count(short)), astuple(count(long))
    share = (length - short) / (long - short)
    return PieceMemory(*(a + share * (b - a) for a, b in zip(low, high, strict=True)))
