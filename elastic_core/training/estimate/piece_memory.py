"""How much memory training takes, in bytes, counted without any: layers and loss run on tensors without storage.

A `Footprint` is what a piece of a training step allocates. The pieces of one kind are alike, so one of them is run,
forward and backward, while the bytes of all storages alive are counted. Nothing is computed and no weight exists.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import astuple, dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elastic_core.model import architectures
from elastic_core.model.layers import Norm, part_of
from elastic_core.model.slicing import Slice
from elastic_core.model.submodel import full_sizes
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.distributed.placement import matrices_to_
from elastic_core.training.losses import distillation_loss

# Longer sequences are counted at two lengths: the same pieces of work come again, and each adds as much. A loss has
# chunks of up to 1,024 tokens. A CPU's scan has short blocks, whose thousands of operations would take minutes.
LOSS_LENGTHS = (2048, 4096)
SCAN_LENGTH = 1024


class Alive(TorchDispatchMode):
    """Counts the bytes of storages that operations have made and that are still alive; not those they were given."""

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
    """Bytes that a piece of a step allocates, besides its weights.

    `output` is what it hands on. `kept` lives from its forward to its backward pass, its input too where that is
    needed again. `forward` is the most alive during the forward pass, input and output among it; `backward` during
    the backward pass, with what was kept and the gradients of output and input. `gradients`, of its weights, stay.
    """

    output: float
    kept: float
    forward: float
    backward: float
    gradients: float


@dataclass(frozen=True)
class Setting:
    """How a worker trains: a stage's precision, and what `distributed.place` does to the model."""

    precision: str = "float32"
    execution: Execution = field(default_factory=Execution)
    distributed: bool = False  # weights are gathered, in the stage's precision, rather than cast on the way
    gpu: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return getattr(torch, self.precision)


def measure(piece: Callable[[Tensor], Tensor], source: Tensor, setting: Setting, weights: nn.Module) -> PieceMemory:
    """The footprint of `piece`, run on a tensor like `source`, where tensors have no storage."""
    with Alive() as alive:
        x = source.clone()  # no leaf, as in the middle of a model
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setting.precision == "bfloat16"):
            y = piece(x)
        forward, output = alive.peak, y.untyped_storage().nbytes()
        del x
        kept = alive.now - output
        alive.peak = alive.now
        y.backward(torch.empty_like(y))
        gradients = [p.grad for p in weights.parameters() if p.grad is not None]
        return PieceMemory(
            output, kept, forward, alive.peak - output, sum(g.untyped_storage().nbytes() for g in gradients)
        )


def affine(count: Callable[[int], PieceMemory], length: int, lengths: tuple[int, int]) -> PieceMemory:
    """`count(length)`, or for more than the longer of two `lengths` the straight line through both."""
    short, long = lengths
    if length <= long:
        return count(length)
    low, high = astuple(count(short)), astuple(count(long))
    share = (length - short) / (long - short)
    return PieceMemory(*(a + share * (b - a) for a, b in zip(low, high, strict=True)))


class Pieces:
    """The pieces of a training step of a parent's whole width, and their footprints.

    With `gates` as while the router learns: every axis is gated, and gates are differentiated.
    """

    def __init__(self, config, setting: Setting, gates: bool = False):
        self.config, self.setting, self.gates = config, setting, gates
        self.family, self.layout = architectures.of(config), architectures.parameter_layout(config)
        self.pattern = architectures.pattern(config)
        self._full = self._make_slice()  # real indices, not fake ones

    @functools.cache  # noqa: B019 (an instance lives as long as a plan)
    def layer(self, character: str, sequences: int, length: int) -> PieceMemory:
        """One layer of a type, by its character in the pattern, on (sequences, length) tokens."""
        count = functools.partial(self._count_layer, character, sequences)
        block = self.family.scan_block(self.config, self.pattern.index(character), sequences)
        if block is None or self.setting.gpu:
            return count(length)
        short = max(SCAN_LENGTH, 2 * block)
        return affine(count, length, (short, 2 * short))

    @functools.cache  # noqa: B019
    def tail(self, tokens: int, has_teacher: bool = True) -> PieceMemory:
        """Final norm and loss: distillation, or cross-entropy alone. The teacher's hidden states are not in it."""
        return affine(lambda count: self._count_tail(count, has_teacher), tokens, LOSS_LENGTHS)

    def _count_layer(self, character: str, sequences: int, length: int) -> PieceMemory:
        index = self.pattern.index(character)
        # On the meta device a scan takes a GPU's sizes. Attention there would be the one that forms all scores; fake
        # tensors on a CPU take the fused one.
        on_meta = self.setting.gpu and self.family.scan_block(self.config, index, sequences) is not None
        with torch.device("meta") if on_meta else FakeTensorMode():
            block = self._as_held(self.family.Block(self.config, index, part_of(self.layout, f"model.layers.{index}")))
            if self.setting.execution.activation_checkpointing:
                checkpoint(block, preserve_rng_state=False)
            shape = (sequences, length, self.config.hidden_size)
            source = torch.empty(shape, dtype=self.setting.dtype, requires_grad=True)
            sliced = self._slice()
            footprint = measure(lambda x: block(x, sliced), source, self.setting, block)
        return self._with_casts(footprint, block) if on_meta else footprint

    def _with_casts(self, footprint: PieceMemory, block: nn.Module) -> PieceMemory:
        """With what autocast adds on a GPU without sharding, which the meta device has not got.

        A bfloat16 copy of every matrix until the backward pass, and gradients in float32 instead.
        """
        setting = self.setting
        if setting.distributed or setting.precision == "float32":
            return footprint
        copies = sum(p.untyped_storage().nbytes() for p in block.parameters() if p.dtype == torch.bfloat16)
        return PieceMemory(
            footprint.output,
            footprint.kept + (0 if setting.execution.activation_checkpointing else copies),
            footprint.forward + copies,
            footprint.backward + 2 * copies,
            footprint.gradients + copies,
        )

    def _count_tail(self, tokens: int, has_teacher: bool = True) -> PieceMemory:
        config = self.config
        shape, dtype = (1, tokens, config.hidden_size), self.setting.dtype
        with FakeTensorMode():
            tail = nn.Module()
            tail.norm = Norm(self.family.norm_eps(config), part_of(self.layout, f"model.{self.family.FINAL_NORM}"))
            tail.head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
            self._as_held(tail)
            teacher = None
            if has_teacher:
                teacher = torch.empty(shape, dtype=dtype), torch.empty(tail.head.shape, dtype=dtype)
            weights = float(not has_teacher), float(has_teacher)
            labels, sliced = torch.empty(shape[:2], dtype=torch.int64), self._slice()
            source = torch.empty(shape, dtype=dtype, requires_grad=True)
            return measure(
                lambda x: distillation_loss(tail.norm(x, sliced), tail.head, labels, teacher, *weights)[0],
                source, self.setting, tail,
            )  # fmt: skip

    def _as_held(self, module: nn.Module) -> nn.Module:
        """Weights as a worker's layers meet them: gathered in the stage's precision, or whole in float32.

        On the meta device, without autocast, in the precision that they are multiplied in.
        """
        on_meta = next(module.parameters()).device.type == "meta"
        if self.setting.precision == "bfloat16" and (self.setting.distributed or on_meta):
            matrices_to_(module, torch.bfloat16)
        return module

    def _slice(self) -> Slice:
        """The full cut, with fake gates where there are any."""
        if not self.gates:
            return self._full
        units = architectures.units(self.config)
        gates = {key: torch.empty(unit.size, requires_grad=True) for key, unit in units.items()}
        return self._make_slice(gates | {"depth": torch.empty(len(self.pattern), requires_grad=True)})

    def _make_slice(self, gates: dict[str, Tensor] | None = None) -> Slice:
        device = gates["depth"].device if gates else torch.device("cpu")
        return Slice(self.layout, device, full_sizes(self.config), tuple(range(len(self.pattern))), gates)
