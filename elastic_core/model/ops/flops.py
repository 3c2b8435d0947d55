"""Floating-point operations of what multiplies matrices inside the layers' own operations; see elastic_core/training/estimate/flops.py.

Of attention over L positions with A heads of D channels: 4·L²·A·D forward, and 5/2 of that backward, where scores are
formed again; all L·L scores count, though causal kernels skip half. Of a norm of width K, per token: 4·K backward. Of
the scan in chunks of Q positions, with H heads of P channels, G groups and N states, per token:

    forward    2·Q·(G·N + H·P) + 4·N·H·P
    backward   2·Q·(3·G·N + 2·H·P + Q·H) + 8·N·H·P

(the terms of N·H·P only where there is more than one chunk).
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic_core.model.ops import ssd


@dataclass(frozen=True)
class Flops:
    """Operations of one pass over some sequences, `forward` and `backward`."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.forward * factor, self.backward * factor)


def attention_flops(length: int, heads: int, head_dim: int) -> Flops:
    """One sequence through softmax attention with so many query heads."""
    return Flops(1, 2.5) * (4 * length**2 * heads * head_dim)


def norm_flops(vectors: int, width: int) -> Flops:
    """So many vectors of `width` channels through an RMS norm."""
    return Flops(0, 4) * (vectors * width)


def scan_flops(length: int, heads: int, channels: int, groups: int, states: int, on_gpu: bool = False) -> Flops:
    """One sequence through the chunked scan of `ops.ssd`, of a Mamba-2 layer of these sizes.

    `on_gpu`: with the chunks of a GPU, which are longer.
    """
    at_most = ssd.CHUNK_ON_GPU
    if not on_gpu:
        at_most = ssd.CHUNK_OF_SMALL_STATES if length > ssd.CHUNK and channels * states < ssd.SMALL else ssd.CHUNK
    num_chunks = -(-length // at_most)
    chunk = -(-length // num_chunks)
    inner, shared = heads * channels, groups * states
    forward, backward = chunk * (shared + inner), chunk * (3 * shared + 2 * inner + chunk * heads)
    if num_chunks > 1:
        forward, backward = forward + 2 * states * inner, backward + 4 * states * inner
    return Flops(forward, backward) * (2 * num_chunks * chunk)
