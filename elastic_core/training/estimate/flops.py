"""The floating-point operations (FLOPs) of training, counted from the layout of the parameters.

A matrix product of (m, k) and (k, n) has 2·m·k·n FLOPs. So a token costs 2 FLOPs in the forward pass and 4 in the
backward pass for every entry of a weight matrix that it is multiplied with. With experts, only those that the token is
sent to count. Embeddings are a table look-up without a product, so they count only if they are also the head.

Products without weight matrices are counted by the formulas in `model/ops/flops.py`: norms over hidden channels here,
and the mixing of tokens (attention, state space scan) in `mixing_flops` of the architecture.

Operations that are not matrix products (activations, gates, softmax, convolution, optimizer) are not counted. torch's
own counter, `torch.utils.flop_counter`, gives exactly the same numbers.
"""

from __future__ import annotations

import math

import torch

from elastic_core.model import architectures
from elastic_core.model.dims import Fixed, Layout, is_matrix, layer_index
from elastic_core.model.layers import has_mask
from elastic_core.model.ops.flops import Flops, norm_flops
from elastic_core.model.submodel import Submodel, full_submodel


def pass_flops(
    config, length: int, submodel: Submodel | None = None, on_gpu: bool = False, pairs: float | None = None
) -> Flops:
    """The FLOPs of one sequence of `length` tokens: forward and backward pass of `submodel` (None: the parent).

    `on_gpu`: count the state space scan with the chunks that it has on a GPU; they are longer.
    `pairs`: the pairs of positions that attention scores (see `attention_pairs`). None: all, as in a row that is one
    document.
    """
    pairs = length**2 if pairs is None else pairs
    submodel = (submodel or full_submodel(config)).resolve(config)
    sizes, kept = submodel.sizes(config), submodel.kept_layers
    total = architectures.of(config).mixing_flops(config, sizes, kept, length, pairs, on_gpu)
    for name, dims in multiplied(config).items():
        layer, count = layer_index(name), math.prod(dim.count(sizes) for dim in dims)
        if layer is None or layer in kept:
            total += norm_flops(length, count) if len(dims) == 1 else Flops(2, 4) * (length * count)
    return total


def attention_pairs(length: int, document_length: float, dtype: torch.dtype, on_gpu: bool) -> float:
    """The pairs of positions that attention scores in a row of `length` positions with several documents.

    Documents of l positions each, Σl = `length`, have Σl² pairs: `length` times the mean length of documents over
    positions, Σl²/Σl, which is `document_length`. Short rows may have a mask instead, and then all pairs are scored.
    `dtype` is the type of the activations.
    """
    return length * (length if has_mask(length, dtype, on_gpu) else document_length)


def multiplied(config) -> Layout:
    """The layout of the matrices that tokens are multiplied with, and of norms over hidden or inner channels."""
    architecture, layout = architectures.of(config), architectures.active_layout(config)
    # Without a head of their own, models use the embeddings as the head (tied embeddings).
    looked_up = f"model.{architecture.EMBEDDINGS}.weight" if "lm_head.weight" in layout else None
    final_norm = f"model.{architecture.FINAL_NORM}.weight"
    multiplied = {name for name, dims in architectures.parameter_layout(config).items() if is_matrix(dims)} - {
        looked_up
    }
    matrices = {name: layout[name] for name in layout if name in multiplied}
    norms = {
        name: dims
        for name, dims in layout.items()
        # A norm over a fixed dimension is one inside attention heads. `mixing_flops` has counted it.
        if name == final_norm or (name.endswith("norm.weight") and not isinstance(dims[0], Fixed))
    }
    return matrices | norms
