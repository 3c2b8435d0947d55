"""Parts of layers that all architectures share. Parameters have the names of transformers and the parent's full shapes.

Every forward takes a `Slice` and computes only with the kept part of the parameters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_core.model.dims import Layout
from elastic_core.model.ops.norm import rms_norm
from elastic_core.model.slicing import Slice


def add_parameters(module: nn.Module, layout: Layout) -> None:
    """Add an uninitialised parameter to `module` for every entry of `layout`; a dot in a name creates a submodule."""
    for name, dims in layout.items():
        owner = module
        *path, leaf = name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(leaf, nn.Parameter(torch.empty([dim.size for dim in dims])))


def part_of(layout: Layout, prefix: str) -> Layout:
    """The entries with names that start with ``PREFIX.``; this start is removed from their names."""
    return {name.removeprefix(f"{prefix}."): dims for name, dims in layout.items() if name.startswith(f"{prefix}.")}


class Norm(nn.Module):
    """RMSNorm over the live hidden channels; x is (B, L, kept hidden)."""

    def __init__(self, eps: float, layout: Layout):
        super().__init__()
        self.eps, self.layout = eps, layout
        add_parameters(self, layout)

    def forward(self, x: Tensor, sliced: Slice) -> Tensor:
        x = rms_norm(x, sliced.weight(self, self.layout, "weight"), self.eps, sliced.num_live("hidden"))
        sliced.observe("hidden", x)
        return x


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention to earlier positions: query (B, L, A, d), key and value (B, L, KV, d) → (B, L, A · d).

    A is the number of kept query heads. The heads of each KV group are adjacent, and every group has A / KV of them.
    """
    return (
        F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        .transpose(1, 2)
        .flatten(2)
    )
