"""Latency and throughput as costs: sums over the kept layers of seconds from a table (latency_table.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from elastic_core.config import require
from elastic_core.cost.latency_table import REMEDY, Table


@dataclass(frozen=True)
class Timed:
    """What latency and throughput share: the table, and the tokens that are in the cache when one is generated."""

    name: ClassVar[str]

    table: Table
    context: int

    def __post_init__(self):
        contexts = self.table.contexts
        allowed = f"{contexts[0]:,}" + (f" to {contexts[-1]:,}" if len(contexts) > 1 else "")
        within = contexts[0] <= self.context <= contexts[-1]
        require(within, "context", self.context, f"{allowed} tokens, as in the table; {REMEDY}, with --context")

    def seconds(self, config, sizes: Mapping, keep: Callable[[int], object]):
        """Seconds of a step, which generates a token for every sequence."""
        return self.table.seconds(config, sizes, keep, self.context)

    @property
    def setting(self) -> str:
        """What else a cost depends on, for people."""
        table = self.table
        threads = f", {table.threads} thread{'s' * (table.threads != 1)}" if table.device == "cpu" else ""
        place = f"{table.dtype} on {table.environment.get('device', table.device)}{threads}"
        return f"{self.context:,} tokens × {table.batch}, {place}"

    def to_json(self) -> dict:
        """What `cost.read_metric` reads: the whole table, so that a checkpoint needs no other file."""
        return {"metric": self.name, "context": self.context, "table": self.table.to_json()}


@dataclass(frozen=True)
class Latency(Timed):
    """Milliseconds per generated token: of a step with `context` tokens in the cache of each of the table's `batch`.

    The expectation is exact where choices are certain, and where the table is linear between them.
    """

    name: ClassVar[str] = "latency"

    def count(self, config, sizes: Mapping, keep: Callable[[int], object]):
        return 1000 * self.seconds(config, sizes, keep)

    def number(self, cost: float) -> str:
        """A cost for people, among others of its kind."""
        return f"{digits(cost)} ms"

    def text(self, cost: float) -> str:
        """A cost for people, with its unit."""
        return f"{digits(cost)} ms/token"


@dataclass(frozen=True)
class Throughput(Timed):
    """Generated tokens per second, of all sequences together. Its cost is the inverse, seconds per token.

    So a budget of 1200tokens/s is a cost of 1/1200, which members come to within the tolerance as with every other
    metric; and a share of 0.75 is three quarters of the parent's seconds: 4/3 of its tokens per second.
    """

    name: ClassVar[str] = "throughput"

    def count(self, config, sizes: Mapping, keep: Callable[[int], object]):
        return self.seconds(config, sizes, keep) / self.table.batch

    def number(self, cost: float) -> str:
        """A cost for people, among others of its kind."""
        return digits(1 / cost)

    def text(self, cost: float) -> str:
        """A cost for people, with its unit."""
        return f"{digits(1 / cost)} tokens/s"


def as_latency(metric):
    """A throughput as the milliseconds per token of the same table, which are shares of the parent's alike."""
    return Latency(metric.table, metric.context) if isinstance(metric, Timed) else metric


def digits(value: float) -> str:
    """Four digits, and all of those before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.4g}"


TIMED = {metric.name: metric for metric in (Latency, Throughput)}
