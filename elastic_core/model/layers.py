"""The layers of a `nemotron_h` model: norm, MLP, grouped-query attention and Mamba-2, each cut to a size.

Parameters carry transformers' names and full shapes; every forward takes a `Cut` and computes with the kept part.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from elastic_core.layout import Layout
from elastic_core.model.cut import Cut
from elastic_core.ops import kernels
from elastic_core.ops.activation import relu_squared
from elastic_core.ops.norm import group_rms_norm, rms_norm


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


class Norm(nn.Module):
    """RMSNorm over the live hidden channels."""

    def __init__(self, config, layout: Layout):
        super().__init__()
        self.eps, self.layout = config.layer_norm_epsilon, layout
        add_parameters(self, layout)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        x = rms_norm(x, cut.weight(self, self.layout, "weight"), self.eps, cut.num_live("hidden"))
        cut.observe("hidden", x)
        return x


class MLP(nn.Module):
    """W2 · act(W1 x), not gated."""

    def __init__(self, config, layer: int, layout: Layout):
        super().__init__()
        self.layout, self.layer, self.units = layout, layer, f"ffn.{layer}"
        self.act = relu_squared if config.mlp_hidden_act == "relu2" else ACT2FN[config.mlp_hidden_act]
        add_parameters(self, layout)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        x = F.linear(x, cut.weight(self, self.layout, "up_proj.weight"), cut.weight(self, self.layout, "up_proj.bias"))
        cut.observe(self.units, x)
        weight = cut.writing_weight(self, self.layout, "down_proj.weight", self.layer, self.units)
        return F.linear(self.act(x), weight, cut.writing_bias(self, self.layout, "down_proj.bias", self.layer))


class Attention(nn.Module):
    """Causal grouped-query attention without positional embedding; query heads are cut inside their KV group."""

    def __init__(self, config, layer: int, layout: Layout):
        super().__init__()
        self.layout, self.layer, self.units = layout, layer, f"attention_heads.{layer}"
        self.head_dim, self.num_key_value_heads = config.head_dim, config.num_key_value_heads
        add_parameters(self, layout)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        num_heads, num_kv = cut.sizes[self.units], self.num_key_value_heads
        query, key, value = (
            F.linear(x, cut.weight(self, self.layout, f"{name}_proj.weight")).unflatten(-1, (heads, self.head_dim))
            for name, heads in (("q", num_heads), ("k", num_kv), ("v", num_kv))
        )
        cut.observe(self.units, query)
        y = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True, enable_gqa=True
        ).transpose(1, 2)  # (B, L, A, head_dim)
        return F.linear(y.flatten(2), cut.writing_weight(self, self.layout, "o_proj.weight", self.layer, self.units))


class Mamba(nn.Module):
    """Mamba-2. Heads are cut inside their group, channels alike in every head; B and C stay whole."""

    def __init__(self, config, layer: int, layout: Layout):
        super().__init__()
        self.layout, self.layer = layout, layer
        self.groups, self.state_size = config.n_groups, config.ssm_state_size
        self.eps = config.layer_norm_epsilon
        self.time_step_min = config.time_step_min  # transformers' only limit on dt
        add_parameters(self, layout)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        heads, channels = cut.sizes[f"mamba_heads.{self.layer}"], cut.sizes[f"mamba_channels.{self.layer}"]
        inner, states = heads * channels, self.groups * self.state_size

        def weight(name: str) -> Tensor | None:
            return cut.weight(self, self.layout, name)

        projected = F.linear(x, weight("in_proj.weight"), weight("in_proj.bias"))
        z, conv, dt = projected.split([inner, inner + 2 * states, heads], dim=-1)
        cut.observe(f"mamba.{self.layer}", conv[..., :inner].unflatten(-1, (heads, channels)))
        conv = kernels.conv_silu(conv, weight("conv1d.weight"), weight("conv1d.bias"), x.dtype)
        y, B, C = conv.split([inner, states, states], dim=-1)
        # Time step and decay in float32 at least, whatever the rest computes in; the scan's sums too.
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + weight("dt_bias")).clamp(min=self.time_step_min)
        y = kernels.scan(
            y.unflatten(-1, (heads, channels)),
            dt,
            -torch.exp(weight("A_log").to(wide)),
            B.unflatten(-1, (self.groups, self.state_size)),
            C.unflatten(-1, (self.groups, self.state_size)),
            weight("D"),
            x.dtype,
        )
        y = self._gated_norm(y.flatten(2), z, weight("norm.weight"), cut, x.dtype)
        return F.linear(
            y,
            cut.writing_weight(self, self.layout, "out_proj.weight", self.layer),
            cut.writing_bias(self, self.layout, "out_proj.bias", self.layer),
        )

    def _gated_norm(self, y: Tensor, z: Tensor, weight: Tensor, cut: Cut, dtype: torch.dtype) -> Tensor:
        """norm(y · silu(z) · gates), where the norm counts the live channels."""
        head_key, channel_key = f"mamba_heads.{self.layer}", f"mamba_channels.{self.layer}"
        gate = self._gate(cut.gate(head_key), cut.gate(channel_key), cut)
        if gate is None:
            return kernels.gated_norm(y, z, weight, self.eps, self.groups, dtype)
        wide = torch.promote_types(y.dtype, torch.float32)
        y = y.to(wide) * F.silu(z.to(wide)) * gate.to(wide)
        num_live = cut.num_live(head_key) * cut.num_live(channel_key) / self.groups
        return group_rms_norm(y, weight, self.eps, self.groups, num_live).to(dtype)

    def _gate(self, heads: Tensor | None, channels: Tensor | None, cut: Cut) -> Tensor | None:
        """The gates of heads and of channels as one, (heads · channels,)."""
        if heads is None and channels is None:
            return None
        sizes = cut.sizes[f"mamba_heads.{self.layer}"], cut.sizes[f"mamba_channels.{self.layer}"]
        if channels is None:
            return heads[:, None].expand(sizes).flatten()
        return channels.expand(sizes).flatten() if heads is None else torch.outer(heads, channels).flatten()


MIXERS = {"M": Mamba, "*": Attention, "-": MLP}


class Block(nn.Module):
    """x + mixer(norm(x)); the mixer gates what it writes."""

    def __init__(self, config, character: str, layer: int, layout: Layout):
        super().__init__()
        self.layer = layer
        self.norm = Norm(config, {"weight": layout["norm.weight"]})
        mixer = {name.removeprefix("mixer."): dims for name, dims in layout.items() if name.startswith("mixer.")}
        self.mixer = MIXERS[character](config, layer, mixer)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return x + self.mixer(self.norm(x, cut), cut)
