"""Slice: the part of the weights a forward pass computes with.

One forward serves two modes. In *hard* mode, the sizes are those of a submodel, and the parameters are narrowed to
them. There are no gates, or gates with the value 1 that only pass a gradient to the router. In *soft* mode, the sizes
are the parent's, and each axis has a gate, a mixture of prefix masks (eqs. 21–35).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from elastic_core.model.dims import Dim, Layout, kept_rows, rows_key, take
from elastic_core.model.ops.device_copy import all_to_device

Observer = Callable[[str, Tensor, Tensor | None, Tensor | None], None]


class Slice:
    """The size of every unit key, the kept layers, and optional gates and an optional observer.

    - `gates` maps a unit key to one multiplier for each kept unit (size,) or for all units (), and ``depth`` to one
      multiplier for each layer of the parent (num_layers,).
    - `norm_gains` maps names of norms to gains (hidden,) that replace those of the model (norm_gains.py).
    - `observe(key, activation, writes, owners)` is called with the activations from which importance is computed, and
      with the name of every norm and its input (B, L, hidden).
      `activation` is (B, L, units...). `writes` is the matrix (hidden, inputs) that writes the activation to the
      residual stream, or None. For neurons of experts, `activation` is (N, neurons), `writes` is (E, out, neurons) or
      None, and `owners` (N,) is the expert of each row; otherwise `owners` is None.
    """

    def __init__(
        self,
        layout: Layout,
        device: torch.device,
        sizes: Mapping[str, int],
        kept_layers: tuple[int, ...],
        gates: Mapping[str, Tensor] | None = None,
        observe: Observer | None = None,
        norm_gains: Mapping[str, Tensor] | None = None,
    ):
        self.sizes, self.kept_layers, self.norm_gains = sizes, kept_layers, norm_gains or {}
        shared = {id(gate): gate.to(device) for gate in (gates or {}).values()}  # the router is in CPU memory
        self.gates = {key: shared[id(gate)] for key, gate in (gates or {}).items()}
        # Computed once per slice and not in every forward. So a compiled forward sees constants, and an index is copied
        # to the device once.
        self._rows = _rows_on_device({dim for dims in layout.values() for dim in dims}, sizes, device)
        self._observe = observe
        self._num_live: dict[str, Tensor] = {}

    def weight(self, module: nn.Module, layout: Layout, name: str) -> Tensor | None:
        """Parameter `name` of `module`, narrowed to the sizes; None if the layout has no such parameter."""
        if name not in layout:
            return None
        return take(module.get_parameter(name), [self._rows[dim] for dim in layout[name]])

    def norm_gain(self, name: str) -> Tensor | None:
        """The kept part of a norm's gain (kept hidden,) if `norm_gains` has one, else None."""
        gain = self.norm_gains.get(name)
        return None if gain is None else gain[: self.sizes["hidden"]]

    def with_norm_gains(self, norm_gains: Mapping[str, Tensor]) -> Slice:
        """The same slice with other gains."""
        other = copy.copy(self)
        other.norm_gains = norm_gains
        return other

    def writing_weight(
        self, module: nn.Module, layout: Layout, name: str, layer: int, units: str | None = None
    ) -> Tensor:
        """A narrowed matrix (hidden, inputs) that writes to the residual stream, multiplied by the gates.

        The rows are multiplied by the gates of the hidden channels and of the layer, and the columns by the gate of
        `units`, the unit key of the inputs. A step has more tokens than the matrix has rows or columns, so this is
        cheaper than to multiply the inputs and outputs of the product.
        """
        weight = self.weight(module, layout, name)
        rows, columns = self.write_gate(layer), None if units is None else self.gate(units)
        if columns is not None:
            columns = columns.repeat_interleave(weight.shape[1] // columns.shape[0]).to(weight.dtype)
        if rows is not None:
            rows = rows.to(weight.dtype)
        if rows is None or columns is None:
            factor = rows[:, None] if rows is not None else columns
            return weight if factor is None else weight * factor
        return _Gated.apply(weight, rows, columns)

    def writing_bias(self, module: nn.Module, layout: Layout, name: str, layer: int) -> Tensor | None:
        """The bias (hidden,) that belongs to a `writing_weight`, multiplied by the gates of its rows, or None."""
        bias, gate = self.weight(module, layout, name), self.write_gate(layer)
        return bias if bias is None or gate is None else bias * gate.to(bias.dtype)

    def write_gate(self, layer: int) -> Tensor | None:
        """The factor for everything a layer writes: gate of hidden channels times gate of the layer, (hidden,)."""
        gate, depth = self.gate("hidden"), self.gates.get("depth")
        if depth is None:
            return gate
        return depth[layer].expand(self.sizes["hidden"]) if gate is None else gate * depth[layer]

    def gate(self, key: str) -> Tensor | None:
        """The gate of a unit key, one entry per kept unit (size,), or None."""
        gate = self.gates.get(key)
        return None if gate is None else gate.expand(self.sizes[key])

    def num_live(self, key: str) -> int | Tensor:
        """The number of live units: the size, or the sum of the gate if there is one."""
        if key not in self.gates:
            return self.sizes[key]
        if key not in self._num_live:
            self._num_live[key] = self.gate(key).sum()
        return self._num_live[key]

    @property
    def is_observed(self) -> bool:
        return self._observe is not None

    def observe(self, key: str, activation: Tensor, writes: Tensor | None = None, owners: Tensor | None = None) -> None:
        """Call the observer, if there is one (see the class)."""
        if self._observe is not None:
            self._observe(key, activation, writes, owners)


def _rows_on_device(dims: set[Dim], sizes: Mapping[str, int], device: torch.device) -> dict[Dim, int | Tensor]:
    """`kept_rows` of every dimension, on `device`. Layers with equal sizes share one index."""
    rows = {dim: kept_rows(dim, sizes) for dim in dims}
    keys = {dim: rows_key(dim, sizes) for dim, found in rows.items() if isinstance(found, Tensor)}
    different = {key: rows[dim] for dim, key in keys.items()}
    on_device = dict(zip(different, all_to_device(list(different.values()), device), strict=True))
    return rows | {dim: on_device[key] for dim, key in keys.items()}


class _Gated(torch.autograd.Function):
    """weight (m, n) · rows (m,) · columns (n,). It reads the matrix less often than two separate products."""

    @staticmethod
    def forward(ctx, weight, rows, columns):
        ctx.save_for_backward(weight, rows, columns)
        return weight * torch.outer(rows, columns)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, rows, columns = ctx.saved_tensors
        product = grad * weight
        return grad * torch.outer(rows, columns), product @ columns, rows @ product
