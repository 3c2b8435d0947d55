"""Floating-point operations (FLOPs) of matrix products inside attention, norms and the state space scan.

elastic_core/training/estimate/flops.py adds the products with weights. The formulas:

- Attention with A heads of D channels over S pairs of positions: 4·S·A·D in the forward pass. The backward pass
  computes the scores again and has 5/2 of that. A document of l positions has l² pairs. All of them count, although
  causal kernels skip half of them. A row of L positions that is one document has L² pairs.
- A norm of width K, per token: 4·K in the backward pass.
- The scan in chunks of Q positions, with H heads of P channels, G groups and N states, per token (the terms with N·H·P
  only if there is more than one chunk):

      forward    2·Q·(G·N + H·P) + 4·N·H·P
      backward   2·Q·(3·G·N + 2·H·P + Q·H) + 8·N·H·P
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic_core.model.ops import ssd


@dataclass(frozen=True)
class Flops:
    """Numbers of operations in the forward and in the backward pass."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.forward * factor, self.backward * factor)


def attention_flops(pairs: float, heads: int, head_dim: int) -> Flops:
    """Softmax attention of one sequence with `heads` query heads, over `pairs` pairs of positions."""
    return Flops(1, 2.5) * (4 * pairs * heads * head_dim)


def norm_flops(vectors: int, width: int) -> Flops:
    """An RMS norm of `vectors` vectors of `width` channels."""
    return Flops(0, 4) * (vectors * width)


def scan_flops(length: int, heads: int, channels: int, groups: int, states: int, on_gpu: bool = False) -> Flops:
    """The chunked scan (ops/ssd.py) of one sequence in a Mamba-2 layer of these sizes.

    `on_gpu`: with the chunk length of a GPU, which is longer.
    """
    longest = ssd.CHUNK_ON_GPU
    if not on_gpu:
        longest = ssd.CHUNK_OF_SMALL_STATES if length > ssd.CHUNK and channels * states < ssd.SMALL else ssd.CHUNK
    num_chunks = -(-length // longest)
    chunk = -(-length // num_chunks)
    inner, shared = heads * channels, groups * states  # H·P, G·N
    forward, backward = chunk * (shared + inner), chunk * (3 * shared + 2 * inner + chunk * heads)
    if num_chunks > 1:
        forward, backward = forward + 2 * states * inner, backward + 4 * states * inner
    return Flops(forward, backward) * (2 * num_chunks * chunk)
