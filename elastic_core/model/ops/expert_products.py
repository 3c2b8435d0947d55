"""The products of routed experts: every (token, expert) pair is multiplied with the matrices of its expert only.

There are three ways, all with the same result. On a CPU the experts take turns. On a GPU the process would then wait
for the number of pairs of each expert, in every layer; so there all experts are multiplied at once: by torch's grouped
product where it is possible (bfloat16), otherwise in blocks whose number depends on no value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

GROUPED_MULTIPLE = 8  # torch's grouped products need rows of a multiple of 16 bytes
SMALLEST_BLOCK = 16  # pairs
Activation = Callable[[Tensor], Tensor]


class ExpertProducts(nn.Module):
    """W2 · (gate · act(W1 x)) for each pair x and its expert's W1 and W2. It has no parameters."""

    def __init__(self, act: Activation):
        super().__init__()
        self.act = act
        self.on_gpu: bool | None = None  # None: where the pairs are. To count memory, tensors stand for those of a GPU.
        # Not compiled, because the number of pairs of an expert changes in every call. As a decorator of the function,
        # this would import the compiler for every model.
        self.in_turn = torch.compiler.disable(in_turn)

    def forward(
        self, pairs: Tensor, owners: Tensor, up: Tensor, down: Tensor, gate: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The inputs of the activation (P, ffn) and the outputs (P, in) of P pairs, which are sorted by expert.

        `pairs` (P, in), `owners` (P,) int64: the expert of each; `up` (E, ffn, in), `down` (E, in, ffn), `gate` (ffn,)
        of the neurons, or None.
        """
        if not (pairs.is_cuda if self.on_gpu is None else self.on_gpu):
            return self.in_turn(pairs, owners, up, down, self.act, gate)
        together = grouped if has_grouped_products(pairs, up, down) else in_blocks
        return together(pairs, owners, up, down, self.act, gate)


def in_turn(pairs: Tensor, owners: Tensor, up: Tensor, down: Tensor, act: Activation, gate: Tensor | None):
    """`ExpertProducts.forward`, one expert after another."""
    inner, outputs = [], []
    parts = pairs.split(pairs_of_experts(owners, len(up)))
    for part, w1, w2 in zip(parts, up.unbind(), down.unbind(), strict=True):  # unbind: one gradient for the stack
        if len(part) > 0:
            inner.append(F.linear(part, w1))
            hidden = act(inner[-1])
            outputs.append(F.linear(hidden if gate is None else hidden * gate, w2))
    return torch.cat(inner), torch.cat(outputs)


def pairs_of_experts(owners: Tensor, num_experts: int) -> list[int]:
    """The number of pairs of each expert. For tensors without values (meta, fake), an equal distribution."""
    if isinstance(owners, FakeTensor) or owners.is_meta:
        each, rest = divmod(owners.numel(), num_experts)
        return [each + (expert < rest) for expert in range(num_experts)]
    return torch.bincount(owners, minlength=num_experts).tolist()


def has_grouped_products(pairs: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether torch's grouped product takes all experts at once on a GPU: in bfloat16 and in fitting widths."""
    kind = pairs.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else pairs.dtype
    strides = [stride for weight in (up, down) for stride in weight.stride()[:2]]
    sizes = [size for weight in (up, down) for size in weight.shape[1:]]
    fits = all(number % GROUPED_MULTIPLE == 0 for number in [*strides, *sizes])
    return dtype == torch.bfloat16 and fits and (not pairs.is_cuda or _has_compute_8(pairs.device))


@functools.cache
def _has_compute_8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def grouped(pairs: Tensor, owners: Tensor, up: Tensor, down: Tensor, act: Activation, gate: Tensor | None):
    """`ExpertProducts.forward` in bfloat16, with one product for all experts."""
    pairs, up, down = (tensor.to(torch.bfloat16) for tensor in (pairs, up, down))
    ends = _ends(owners, len(up)).int()
    inner = F.grouped_mm(pairs, up.mT, offs=ends)
    hidden = act(inner)
    hidden = hidden if gate is None else hidden * gate.to(hidden.dtype)
    # Autocast computes some activations in float32, and does not know grouped products.
    return inner, F.grouped_mm(hidden.to(torch.bfloat16), down.mT, offs=ends)


def in_blocks(pairs: Tensor, owners: Tensor, up: Tensor, down: Tensor, act: Activation, gate: Tensor | None):
    """`ExpertProducts.forward` with all pairs in blocks of one size, each of one expert, filled up with zeros.

    A block is as long as the pairs of an expert on average, so there are fewer than two blocks per expert, and fewer
    than twice as many rows as pairs, but for very few pairs.
    """
    num_pairs, num_experts = len(owners), len(up)
    size = max(SMALLEST_BLOCK, -(-num_pairs // num_experts))
    number = min(num_pairs, (num_pairs + num_experts * (size - 1)) // size)  # as many as there can be
    ends = _ends(owners, num_experts)
    counts = ends.diff(prepend=ends.new_zeros(1))
    blocks = (counts + size - 1) // size
    last = blocks.cumsum(0)
    shift = (last - blocks) * size - (ends - counts)  # from an expert's first pair to its first row
    rows = torch.arange(num_pairs, device=owners.device) + shift[owners]  # of each pair
    of_blocks = torch.searchsorted(last, torch.arange(number, device=owners.device), right=True)
    of_blocks = of_blocks.clamp(max=num_experts - 1)  # blocks behind the last pair have zeros only
    padded = pairs.new_zeros(number * size, pairs.shape[1]).index_copy(0, rows, pairs)
    inner = _block_product(padded.view(number, size, -1), up, of_blocks)
    hidden = act(inner)
    y = _block_product(hidden if gate is None else hidden * gate, down, of_blocks)
    return inner.flatten(0, 1).index_select(0, rows), y.flatten(0, 1).index_select(0, rows)


def _ends(owners: Tensor, num_experts: int) -> Tensor:
    """Behind the last pair of each expert (E,) int64. `owners` are sorted."""
    return torch.searchsorted(owners, torch.arange(num_experts, device=owners.device), right=True)


def _block_product(blocks: Tensor, weight: Tensor, owners: Tensor) -> Tensor:
    """blocks[n] · weight[owners[n]]ᵀ for every block, as autocast computes products. (N, B, in), (E, out, in), (N,)."""
    kind = blocks.device.type
    if torch.is_autocast_enabled(kind):
        blocks, weight = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (blocks, weight))
    return _BlockProduct.apply(blocks, weight, owners)


class _BlockProduct(torch.autograd.Function):
    """The matrices of the blocks, copied from those of the experts, exist only while the product is computed."""

    @staticmethod
    def forward(ctx, blocks, weight, owners):
        ctx.save_for_backward(blocks, weight, owners)
        return blocks @ weight.index_select(0, owners).mT

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        blocks, weight, owners = ctx.saved_tensors
        grad_weight = torch.zeros_like(weight).index_add_(0, owners, grad.mT @ blocks)
        return grad @ weight.index_select(0, owners), grad_weight, None
