"""The Mamba-2 layer of nemotron_h. All heads have the same number of channels; the heads of a group share B and C."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_core.model.dims import Concat, Fixed, Layout, Product, Units
from elastic_core.model.documents import Documents
from elastic_core.model.layers import add_parameters
from elastic_core.model.ops import kernels
from elastic_core.model.ops.norm import group_rms_norm
from elastic_core.model.ops.parts import part_of
from elastic_core.model.slicing import Slice

LIMIT = "time_step_limit"  # of the configuration: the smallest and the largest time step
NO_LIMIT = (0.0, math.inf)
SMALLEST, LARGEST = 1e-30, 1e30  # no time step that matters is smaller or larger; transformers needs one above 0
Weight = Callable[[str], Tensor | None]  # the narrowed parameter of a name


def mamba_layout(config, i: int, keys: dict[str, Units]) -> Layout:
    """The parameters of a Mamba-2 layer and their dimensions."""
    hidden, heads = keys["hidden"], keys[f"mamba_heads.{i}"]
    inner = Product((heads, keys[f"mamba_channels.{i}"]))
    states = Fixed(config.n_groups * config.ssm_state_size)
    conv = Concat((inner, states, states))  # x | B | C
    projection = Concat((inner, conv, heads))  # z | x | B | C | dt
    layout = {
        "in_proj.weight": (projection, hidden),
        "conv1d.weight": (conv, Fixed(1), Fixed(config.conv_kernel)),
        "dt_bias": (heads,),
        "A_log": (heads,),
        "D": (heads,),
        "norm.weight": (inner,),
        "out_proj.weight": (hidden, inner),
    }
    if config.use_conv_bias:
        layout["conv1d.bias"] = (conv,)
    if config.use_bias:
        layout |= {"in_proj.bias": (projection,), "out_proj.bias": (hidden,)}
    return layout


def limit_requirement(config) -> tuple[bool, str]:
    """The condition on `time_step_limit`, with the message if it does not hold."""
    limit = config.time_step_limit
    valid = isinstance(limit, (list, tuple)) and len(limit) == 2
    valid = valid and all(isinstance(one, (int, float)) for one in limit) and 0 <= limit[0] <= limit[1]
    return valid, f"{LIMIT}={limit}; allowed: the smallest and the largest time step, such as [0.0, Infinity]"


def clamped_limit(config) -> tuple[float, float]:
    """The limits with which transformers computes: `time_step_min` is the smallest time step."""
    low, high = config.time_step_limit
    return max(low, config.time_step_min), high


def with_time_step_limit(values: dict) -> dict:
    """The values of config.json in which all readers find the same limits of the time step, in JSON.

    vLLM, MLX and llama.cpp follow `time_step_limit` or have no limits. transformers ignores it and takes
    `time_step_min` for the lower limit when it reads a text (not when it decodes with a cache), although that is only
    how the parent's weights were initialised. So both have the same lower limit here. JSON has no infinity:
    transformers writes an object for it, which others do not understand.
    """
    kept = {name: value for name, value in values.items() if name != LIMIT}
    low, high = (float(one["__float__"]) if isinstance(one, dict) else one for one in values[LIMIT])
    kept["time_step_min"] = max(low, SMALLEST)
    return kept if (low, high) == NO_LIMIT else kept | {LIMIT: [low, min(high, LARGEST)]}


class Mamba(nn.Module):
    """Mamba-2. Every group keeps the same number of heads, and every head the same channels. B and C stay whole."""

    def __init__(self, config, layer: int, layout: Layout):
        super().__init__()
        self.layout, self.layer = layout, layer
        self.groups, self.state_size = config.n_groups, config.ssm_state_size
        self.eps = config.layer_norm_epsilon
        self.time_step_limit = tuple(config.time_step_limit)
        self.find_kernel = kernels.layer_kernel
        add_parameters(self, layout)

    def forward(self, x: Tensor, sliced: Slice, documents: Documents | None = None) -> Tensor:
        heads, channels = sliced.sizes[f"mamba_heads.{self.layer}"], sliced.sizes[f"mamba_channels.{self.layer}"]

        def weight(name: str) -> Tensor | None:
            return sliced.weight(self, self.layout, name)

        projected = F.linear(x, weight("in_proj.weight"), weight("in_proj.bias"))
        kernel = self._kernel(projected, heads * channels, sliced, x.dtype, documents)
        if kernel is None:
            y = self._in_parts(projected, weight, heads, channels, sliced, x.dtype, documents)
        else:
            A, D = (weight(name).to(torch.promote_types(x.dtype, torch.float32)) for name in ("A_log", "D"))
            conv, bias, dt_bias, norm = map(weight, ("conv1d.weight", "conv1d.bias", "dt_bias", "norm.weight"))
            sizes = kernels.MambaSizes(channels, self.groups, self.time_step_limit, self.eps)
            y = kernel(projected.to(x.dtype), conv.squeeze(1), bias, dt_bias, -torch.exp(A), D, norm, sizes, documents)
        writes = sliced.writing_weight(self, self.layout, "out_proj.weight", self.layer)
        sliced.observe(f"mamba.{self.layer}", y, writes)
        return F.linear(y, writes, sliced.writing_bias(self, self.layout, "out_proj.bias", self.layer))

    def _kernel(self, projected: Tensor, inner: int, sliced: Slice, dtype, documents) -> Callable | None:
        """The kernel of the whole layer, where no gate, no observer and no other worker needs what is inside."""
        gates = (sliced.gate(f"{axis}.{self.layer}") for axis in ("mamba_heads", "mamba_channels"))
        if sliced.is_observed or any(gate is not None for gate in gates) or part_of(documents) is not None:
            return None
        taps, states = self.layout["conv1d.weight"][-1].size, self.groups * self.state_size
        return self.find_kernel(projected, inner, inner + 2 * states, taps, dtype)

    def _in_parts(
        self, projected: Tensor, weight: Weight, heads: int, channels: int, sliced: Slice, dtype, documents
    ) -> Tensor:
        inner, states = heads * channels, self.groups * self.state_size
        z, conv, dt = projected.split([inner, inner + 2 * states, heads], dim=-1)
        sliced.observe(f"mamba.{self.layer}", conv[..., :inner].unflatten(-1, (heads, channels)))
        conv = kernels.conv_silu(conv, weight("conv1d.weight"), weight("conv1d.bias"), dtype, documents)
        y, B, C = conv.split([inner, states, states], dim=-1)
        # Time step, decay and the sums of the scan are in float32 or higher, for any type of x, because low precision
        # there can lead to infinite gradients.
        wide = torch.promote_types(dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + weight("dt_bias"))
        if self.time_step_limit != NO_LIMIT:
            dt = dt.clamp(*self.time_step_limit)
        y = kernels.scan(
            y.unflatten(-1, (heads, channels)),
            dt,
            -torch.exp(weight("A_log").to(wide)),
            B.unflatten(-1, (self.groups, self.state_size)),
            C.unflatten(-1, (self.groups, self.state_size)),
            weight("D"),
            dtype,
            documents,
        )
        return self._gated_norm(y.flatten(2), z, weight("norm.weight"), sliced, dtype)

    def _gated_norm(self, y: Tensor, z: Tensor, weight: Tensor, sliced: Slice, dtype: torch.dtype) -> Tensor:
        """norm(y · silu(z) · gates); the norm divides by the number of live channels. y and z (B, L, inner)."""
        head_key, channel_key = f"mamba_heads.{self.layer}", f"mamba_channels.{self.layer}"
        gate = self._gate(sliced.gate(head_key), sliced.gate(channel_key), sliced)
        if gate is None:
            return kernels.gated_norm(y, z, weight, self.eps, self.groups, dtype)
        wide = torch.promote_types(y.dtype, torch.float32)
        y = y.to(wide) * F.silu(z.to(wide)) * gate.to(wide)
        num_live = sliced.num_live(head_key) * sliced.num_live(channel_key) / self.groups
        return group_rms_norm(y, weight, self.eps, self.groups, num_live).to(dtype)

    def _gate(self, heads: Tensor | None, channels: Tensor | None, sliced: Slice) -> Tensor | None:
        """The product of the gates of heads and of channels, (heads · channels,); None if there is no gate."""
        if heads is None and channels is None:
            return None
        sizes = sliced.sizes[f"mamba_heads.{self.layer}"], sliced.sizes[f"mamba_channels.{self.layer}"]
        if channels is None:
            return heads[:, None].expand(sizes).flatten()
        return channels.expand(sizes).flatten() if heads is None else torch.outer(heads, channels).flatten()
