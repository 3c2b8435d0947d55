"""The number of parameters as a cost metric (see metrics.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from elastic_core.model import architectures
from elastic_core.model.dims import count


@dataclass(frozen=True)
class Parameters:
    """The number of parameters.

    The expected cost is exact, because the count is multilinear in the sizes and the sizes are independent.
    """

    name: ClassVar = "parameters"

    def count(self, config, sizes: Mapping, keep: Callable[[int], object]):
        return count(architectures.parameter_layout(config), sizes, keep)

    def number(self, cost: float) -> str:
        """A cost as short text, for the first value of a range."""
        return f"{cost:,.0f}"

    def text(self, cost: float) -> str:
        """A cost as text for people, with its unit."""
        return f"{cost:,.0f} parameters"

    @property
    def setting(self) -> str:
        """The settings on which the cost depends, as text for people."""
        return ""

    def to_json(self) -> str | dict:
        """The value in elastic.json that `read_metric` reads."""
        return self.name


@dataclass(frozen=True)
class ActiveParameters(Parameters):
    """The number of parameters that one token uses.

    A token uses `num_experts_per_tok` of the routed experts and all other parameters. So narrower experts lower this
    count. Fewer experts lower it only by their rows in the layer's router.
    """

    name: ClassVar = "active_parameters"

    def count(self, config, sizes: Mapping, keep: Callable[[int], object]):
        return count(architectures.active_layout(config), sizes, keep)

    def text(self, cost: float) -> str:
        """A cost as text for people, with its unit."""
        return f"{cost:,.0f} active parameters"
