"""What `mamba_ssm`'s kernel of a whole Mamba layer allocates: the same tensors, in the same order, without any values.

It stands in the kernel's place when `piece_memory` counts a layer on tensors without storage. tests/cuda_path compares
it with the package's own code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from elastic_core.model.documents import Documents
from elastic_core.model.ops.kernels import CHUNK, MambaSizes


def find(projected: Tensor, inner: int, conv_channels: int, taps: int, dtype: torch.dtype) -> Callable:
    """In the place of `kernels.layer_kernel`: a function that allocates what the kernel does."""
    return LayerMemory.apply


class LayerMemory(torch.autograd.Function):
    """projected (B, L, W) and the layer's small weights → (B, L, inner).

    Letters: H heads, P channels of a head, G groups, N states, c chunks of Q positions. The states of all chunks are
    the largest tensors: c·H·P·N numbers, in float32 while they are passed on.
    """

    @staticmethod
    def forward(
        ctx,
        projected: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        norm_weight: Tensor,
        sizes: MambaSizes,
        documents: Documents | None,
    ) -> Tensor:
        batch, length, _ = projected.shape
        inner = len(norm_weight)
        conv = projected.new_empty(batch, length, len(weight))
        decays, wide_states, scores = _of_chunks(projected, weight, A, sizes)
        states = torch.empty_like(wide_states, dtype=projected.dtype)
        del wide_states
        y = projected.new_empty(batch, length, inner)
        del scores
        out, inverse = torch.empty_like(y), A.new_empty(sizes.groups * batch * length)
        del decays, states, conv
        ctx.save_for_backward(projected, weight, bias, dt_bias, A, D, norm_weight, y, inverse)
        ctx.sizes = sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        projected, weight, bias, dt_bias, A, D, norm_weight, y, _ = ctx.saved_tensors
        conv = projected.new_empty(*projected.shape[:2], len(weight))
        grad_projected, grad_conv = torch.empty_like(projected), torch.empty_like(conv)
        grad_y, dt = torch.empty_like(y), projected.new_empty(*projected.shape[:2], len(A))
        decays, wide_states, scores = _of_chunks(projected, weight, A, ctx.sizes)
        passed = torch.empty_like(wide_states)
        del wide_states
        wide_grads = torch.empty_like(passed)
        states, grads = (torch.empty_like(passed, dtype=projected.dtype) for _ in range(2))
        del passed, wide_grads
        shared = (len(weight) - len(norm_weight)) // 2  # G·N
        grad_B, grad_C = (A.new_empty(*projected.shape[:2], shared) for _ in range(2))
        grad_scores = torch.empty_like(scores)
        of_weights = [None if value is None else torch.empty_like(value) for value in (weight, bias, dt_bias, A, D)]
        del grad_B, grad_C, grad_scores, states, grads, decays, dt, grad_y, grad_conv, conv
        return grad_projected, *of_weights, torch.empty_like(norm_weight), None, None


def _of_chunks(projected: Tensor, weight: Tensor, A: Tensor, sizes: MambaSizes) -> tuple[list[Tensor], Tensor, Tensor]:
    """Time steps and decays (B, H, c, Q), states (B, c, H, P, N), and C·B (B, c, G, Q, Q), all in float32."""
    batch, length, _ = projected.shape
    chunks, heads = -(-length // CHUNK), len(A)
    states = (len(weight) - heads * sizes.channels) // 2 // sizes.groups
    decays = [A.new_empty(batch, heads, chunks, CHUNK) for _ in range(2)]
    of_chunks = A.new_empty(batch, chunks, heads, sizes.channels, states)
    return decays, of_chunks, A.new_empty(batch, chunks, sizes.groups, CHUNK, CHUNK)
