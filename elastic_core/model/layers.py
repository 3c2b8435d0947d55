"""What the layers of all families are made of. Parameters carry transformers' names and full shapes.

Every forward takes a `Cut` and computes with the kept part.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_core.model.dims import Layout
from elastic_core.model.ops.norm import rms_norm
from elastic_core.model.slicing import Slice


def add_parameters(module: nn.Module, layout: Layout) -> None:
    """Give `module` an empty parameter per entry of `layout`, in submodules where a name has a dot."""
    for name, dims in layout.items():
        owner = module
        *path, leaf = name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(leaf, nn.Parameter(torch.empty([dim.size for dim in dims])))


def part_of(layout: Layout, prefix: str) -> Layout:
    """The entries below `prefix.`, named from there."""
    return {name.removeprefix(f"{prefix}."): dims for name, dims in layout.items() if name.startswith(f"{prefix}.")}


class Norm(nn.Module):
    """RMSNorm over the live hidden channels."""

    def __init__(self, eps: float, layout: Layout):
        super().__init__()
        self.eps, self.layout = eps, layout
        add_parameters(self, layout)

    def forward(self, x: Tensor, sliced: Slice) -> Tensor:
        x = rms_norm(x, sliced.weight(self, self.layout, "weight"), self.eps, sliced.num_live("hidden"))
        sliced.observe("hidden", x)
        return x


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax over earlier positions: query (B, L, A, d), key and value (B, L, KV, d) → (B, L, A · d).

    The query heads of a KV group are as many as the cut has left, and stand together.
    """
    return (
        F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        .transpose(1, 2)
        .flatten(2)
    )
