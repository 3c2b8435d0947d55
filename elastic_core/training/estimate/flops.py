"""Floating-point operations of training, counted from the layout; a product of (m, k) and (k, n) is 2·m·k·n of them.

Per token, of matrices that are multiplied: 2 forward and 4 backward for every number in them; of experts, in those that
a token is sent to. Embeddings are looked up, and count only where they are the head too. What multiplies no weights is
as `ops.flops` says: norms of the hidden channels here, and what layers mix tokens with by their family's
`mixing_flops`.

What does not multiply matrices (activations, gates, softmax, convolution, optimizer) is not counted: torch's own
counter, `torch.utils.flop_counter`, says the same number, exactly.
"""

from __future__ import annotations

import math

from elastic_core.model import architectures
from elastic_core.model.dims import Fixed, Layout, is_matrix, layer_index
from elastic_core.model.ops.flops import Flops, norm_flops
from elastic_core.model.submodel import Submodel, full_submodel


def pass_flops(config, length: int, submodel: Submodel | None = None, on_gpu: bool = False) -> Flops:
    """One sequence of `length` tokens through a submodel (None: the parent), from embeddings to logits and back.

    `on_gpu`: with the scan's chunks on a GPU, which are longer.
    """
    submodel = (submodel or full_submodel(config)).resolve(config)
    sizes, kept = submodel.sizes(config), submodel.kept_layers
    total = architectures.of(config).mixing_flops(config, sizes, kept, length, on_gpu)
    for name, dims in multiplied(config).items():
        layer, count = layer_index(name), math.prod(dim.count(sizes) for dim in dims)
        if layer is None or layer in kept:
            total += norm_flops(length, count) if len(dims) == 1 else Flops(2, 4) * (length * count)
    return total


def multiplied(config) -> Layout:
    """The matrices that tokens are multiplied with, and the weights of norms over hidden or inner channels."""
    family, layout = architectures.of(config), architectures.active_layout(config)
    looked_up = f"model.{family.EMBEDDINGS}.weight" if "lm_head.weight" in layout else None  # tied: they are the head
    final_norm = f"model.{family.FINAL_NORM}.weight"
    multiplied = {name for name, dims in architectures.parameter_layout(config).items() if is_matrix(dims)} - {
        looked_up
    }
    matrices = {name: layout[name] for name in layout if name in multiplied}
    norms = {
        name: dims
        for name, dims in layout.items()
        if name == final_norm or (name.endswith("norm.weight") and not isinstance(dims[0], Fixed))  # not inside heads
    }
    return matrices | norms
