"""The number of parameters as a cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from elastic_core.model import architectures
from elastic_core.model.dims import count


@dataclass(frozen=True)
class Parameters:
    """The number of parameters. Multilinear in sizes that are drawn independently: the expectation is exact."""

    name: ClassVar = "parameters"

    def count(self, config, sizes: Mapping, keep: Callable[[int], object]):
        return count(architectures.parameter_layout(config), sizes, keep)

    def number(self, cost: float) -> str:
        """A cost for people, among others of its kind."""
        return f"{cost:,.0f}"

    def text(self, cost: float) -> str:
        """A cost for people, with its unit."""
        return f"{cost:,.0f} parameters"

    @property
    def setting(self) -> str:
        """What else a cost depends on, for people."""
        return ""

    def to_json(self) -> str | dict:
        """What `read_metric` reads."""
        return self.name


@dataclass(frozen=True)
class ActiveParameters(Parameters):
    """The number of parameters that one token uses: of routed experts as many as it is sent to, of all else all.

    So it is less in narrower experts, but not in fewer of them, save for their rows of the router.
    """

    name: ClassVar = "active_parameters"

    def count(self, config, sizes: Mapping, keep: Callable[[int], object]):
        return count(architectures.active_layout(config), sizes, keep)

    def text(self, cost: float) -> str:
        """A cost for people, with its unit."""
        return f"{cost:,.0f} active parameters"
