"""Floating-point operations of training, counted from the layout; a product of (m, k) and (k, n) is 2·m·k·n of them.

Per token, of matrices that are multiplied: 2 forward and 4 backward for every number in them (all but the embeddings,
which are looked up). Per token of attention over L positions with A heads of D channels: 4·L·A·D forward, and 5/2 of
that backward, where scores are formed again; all L·L scores count, though causal kernels skip half. Norms of width K:
4·K backward. The scan in chunks of Q positions, with H heads of P channels, G groups and N states:

    forward    2·Q·(G·N + H·P) + 4·N·H·P
    backward   2·Q·(3·G·N + 2·H·P + Q·H) + 8·N·H·P

(the terms of N·H·P only where there is more than one chunk).

What does not multiply matrices (activations, gates, softmax, convolution, optimizer) is not counted: torch's own
counter, `torch.utils.flop_counter`, says the same number, exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from elastic_core.layout import layer_index, layers_of, parameter_layout
from elastic_core.ops import ssd
from elastic_core.submodel import Submodel, full_submodel


@dataclass(frozen=True)
class Flops:
    """Operations of one pass over some sequences, `forward` and `backward`."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.forward * factor, self.backward * factor)


def pass_flops(config, length: int, submodel: Submodel | None = None, on_gpu: bool = False) -> Flops:
    """One sequence of `length` tokens through a submodel (None: the parent), from embeddings to logits and back.

    `on_gpu`: with the scan's chunks on a GPU, which are longer.
    """
    submodel = (submodel or full_submodel(config)).resolve(config)
    sizes, kept = submodel.sizes(config), set(submodel.kept_layers)
    total = Flops()
    for name, dims in parameter_layout(config).items():
        layer, count = layer_index(name), math.prod(dim.count(sizes) for dim in dims)
        if (layer is None or layer in kept) and name != "model.embeddings.weight":
            if len(dims) == 2:
                total += Flops(2, 4) * (length * count)
            elif name.endswith(("norm.weight", "norm_f.weight")):
                total += Flops(0, 4) * (length * count)
    for layer in kept & set(layers_of(config, "*")):
        total += Flops(1, 2.5) * (4 * length**2 * sizes[f"attention_heads.{layer}"] * config.head_dim)
    for layer in kept & set(layers_of(config, "M")):
        heads, channels = sizes[f"mamba_heads.{layer}"], sizes[f"mamba_channels.{layer}"]
        total += scan_flops(length, heads, channels, config.n_groups, config.ssm_state_size, on_gpu)
    return total


def scan_flops(length: int, heads: int, channels: int, groups: int, states: int, on_gpu: bool = False) -> Flops:
    """One sequence through the chunked scan of `ops.ssd`, of a Mamba-2 layer of these sizes."""
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
