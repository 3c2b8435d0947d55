"""Cut: which part of the model a forward pass computes with.

One forward serves two modes. *Hard*: sizes below the parent's, parameters narrowed, no gates or gates of value one
that only carry a gradient. *Soft*: full sizes, and a gate per axis that mixes prefix masks (eqs. 21–35).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from elastic_core.model.dims import Dim, Layout, kept_rows, take

Observer = Callable[[str, Tensor, Tensor | None, Tensor | None], None]


class Slice:
    """Sizes of every unit key, kept layers, and optional gates and observer.

    `gates` maps unit keys to a multiplier per kept unit, or one for all (shape (size,) or ()), and ``depth`` to one
    per parent layer (layers,). `observe(key, activation, writes, owners)` sees the activations that width importance
    scores, (B, L, units...); `writes` is the matrix (hidden, inputs) by which the activation is written to the residual
    stream, or None. Of neurons of experts it sees (N, neurons), `writes` (E, out, neurons), and the expert of each row,
    `owners` (N,), else None.
    """

    def __init__(
        self,
        layout: Layout,
        device: torch.device,
        sizes: Mapping[str, int],
        kept_layers: tuple[int, ...],
        gates: Mapping[str, Tensor] | None = None,
        observe: Observer | None = None,
    ):
        self.sizes, self.kept_layers = sizes, kept_layers
        shared = {id(gate): gate.to(device) for gate in (gates or {}).values()}  # the router stays in CPU memory
        self.gates = {key: shared[id(gate)] for key, gate in (gates or {}).items()}
        # Looked up once per cut, not in every forward: a compiled forward then finds constants, and an index is
        # copied to the device once.
        self._rows: dict[Dim, int | Tensor] = {}
        for dim in {dim for dims in layout.values() for dim in dims}:
            rows = kept_rows(dim, self.sizes)
            self._rows[dim] = rows.to(device) if isinstance(rows, Tensor) else rows
        self._observe = observe
        self._num_live: dict[str, Tensor] = {}

    def weight(self, module: nn.Module, layout: Layout, name: str) -> Tensor | None:
        """Parameter `name` of `module`, narrowed; None where the architecture has no such parameter."""
        if name not in layout:
            return None
        return take(module.get_parameter(name), [self._rows[dim] for dim in layout[name]])

    def writing_weight(
        self, module: nn.Module, layout: Layout, name: str, layer: int, units: str | None = None
    ) -> Tensor:
        """A matrix (hidden, inputs) whose product is written to the residual stream, the gates folded into it.

        Rows by the gates of hidden channels and of the layer, columns by that of the inputs' `units`: a step has more
        tokens than the matrix has rows or columns, so this costs less than gating what goes in and comes out.
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
        """The bias (hidden,) beside a `writing_weight`."""
        bias, gate = self.weight(module, layout, name), self.write_gate(layer)
        return bias if bias is None or gate is None else bias * gate.to(bias.dtype)

    def write_gate(self, layer: int) -> Tensor | None:
        """What a layer writes is multiplied by: the gate of hidden channels times the layer's, (hidden,)."""
        gate, depth = self.gate("hidden"), self.gates.get("depth")
        if depth is None:
            return gate
        return depth[layer].expand(self.sizes["hidden"]) if gate is None else gate * depth[layer]

    def gate(self, key: str) -> Tensor | None:
        """The gate of a unit key, one entry per kept unit."""
        gate = self.gates.get(key)
        return None if gate is None else gate.expand(self.sizes[key])

    def num_live(self, key: str) -> int | Tensor:
        """How many units are live: the size, or the sum of the gate."""
        if key not in self.gates:
            return self.sizes[key]
        if key not in self._num_live:
            self._num_live[key] = self.gate(key).sum()
        return self._num_live[key]

    @property
    def is_observed(self) -> bool:
        return self._observe is not None

    def observe(self, key: str, activation: Tensor, writes: Tensor | None = None, owners: Tensor | None = None) -> None:
        if self._observe is not None:
            self._observe(key, activation, writes, owners)


class _Gated(torch.autograd.Function):
    """weight (m, n) · rows (m,) · columns (n,), with fewer passes over the matrix than two products have."""

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
