"""Cut: which part of the model a forward pass computes with.

One forward serves two modes. *Hard*: sizes below the parent's, parameters narrowed, no gates or gates of value one
that only carry a gradient. *Soft*: full sizes, and a gate per axis that mixes prefix masks (eqs. 21–35).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from elastic_core.layout import Dim, Layout, kept_rows, take
from elastic_core.submodel import Submodel

Observer = Callable[[str, Tensor], None]


class Cut:
    """Sizes of every unit key, kept layers, and optional gates and observer.

    `gates` maps unit keys to a multiplier per kept unit, or one for all (shape (size,) or ()), and ``depth`` to one
    per parent layer (layers,). `observe(key, activation)` sees the activations that width importance scores.
    """

    def __init__(
        self,
        config,
        layout: Layout,
        device: torch.device,
        submodel: Submodel,
        gates: Mapping[str, Tensor] | None = None,
        observe: Observer | None = None,
    ):
        submodel = submodel.resolve(config)
        self.sizes = submodel.sizes(config)
        self.kept_layers = submodel.kept_layers
        shared = {id(gate): gate.to(device) for gate in (gates or {}).values()}  # the router stays in CPU memory
        self.gates = {key: shared[id(gate)] for key, gate in (gates or {}).items()}
        # Looked up once per cut, not in every forward: a compiled forward then finds constants, and an index is
        # copied to the device once.
        self._rows: dict[Dim, int | Tensor] = {}
        for dim in {dim for dims in layout.values() for dim in dims}:
            rows = kept_rows(dim, self.sizes)
            self._rows[dim] = rows.to(device) if isinstance(rows, Tensor) else rows
        self._observe = observe

    def weight(self, module: nn.Module, layout: Layout, name: str) -> Tensor | None:
        """Parameter `name` of `module`, narrowed; None where the architecture has no such parameter."""
        if name not in layout:
            return None
        return take(module.get_parameter(name), [self._rows[dim] for dim in layout[name]])

    def gate(self, key: str) -> Tensor | None:
        """The gate of a unit key, one entry per kept unit."""
        gate = self.gates.get(key)
        return None if gate is None else gate.expand(self.sizes[key])

    def num_live(self, key: str) -> int | Tensor:
        """How many units are live: the size, or the sum of the gate."""
        gate = self.gate(key)
        return self.sizes[key] if gate is None else gate.sum()

    def write(self, x: Tensor, layer: int | None = None) -> Tensor:
        """What is written to the residual stream (..., hidden): gated per channel, and by depth for a layer's."""
        if (gate := self.gate("hidden")) is not None:
            x = x * gate.to(x.dtype)  # gates are float32; the residual stream keeps its own type
        if layer is not None and "depth" in self.gates:
            x = x * self.gates["depth"][layer].to(x.dtype)
        return x

    def observe(self, key: str, activation: Tensor) -> None:
        if self._observe is not None:
            self._observe(key, activation)
