"""Latency and throughput as cost metrics: the seconds of the kept layers, from a measured table (latency_table.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from elastic_core.config import require
from elastic_core.cost.latency_table import REMEDY, Table


@dataclass(frozen=True)
class Timed:
    """The common part of latency and throughput: the table, and the number of tokens in the cache (the context).

    Raises ConfigError for a context outside the table.
    """

    name: ClassVar[str]

    table: Table
    context: int

    def __post_init__(self):
        contexts = self.table.contexts
        allowed = f"{contexts[0]:,}" + (f" to {contexts[-1]:,}" if len(contexts) > 1 else "")
        within = contexts[0] <= self.context <= contexts[-1]
        require(within, "context", self.context, f"{allowed} tokens, as in the table; {REMEDY}, with --context")

    def seconds(self, config, sizes: Mapping, keep: Callable[[int], object]):
        """Seconds of one decoding step, which generates one token for every sequence. Arguments as in metrics.py."""
        return self.table.seconds(config, sizes, keep, self.context)

    @property
    def setting(self) -> str:
        """The settings on which the cost depends, as text for people."""
        table = self.table
        threads = f", {table.threads} thread{'s' * (table.threads != 1)}" if table.device == "cpu" else ""
        device = f"{table.dtype} on {table.environment.get('device', table.device)}{threads}"
        return f"{self.context:,} tokens × {table.batch}, {device}"

    def to_json(self) -> dict:
        """The value in elastic.json that `read_metric` reads. It has the whole table, so no other file is needed."""
        return {"metric": self.name, "context": self.context, "table": self.table.to_json()}


@dataclass(frozen=True)
class Latency(Timed):
    """Milliseconds per generated token, the time of one step for `table.batch` sequences of `context` cached tokens.

    The expected cost is exact if every choice has probability 0 or 1, or if the table is linear between the choices.
    """

    name: ClassVar[str] = "latency"

    def count(self, config, sizes: Mapping, keep: Callable[[int], object]):
        return 1000 * self.seconds(config, sizes, keep)

    def number(self, cost: float) -> str:
        """A cost as short text, for the first value of a range."""
        return f"{digits(cost)} ms"

    def text(self, cost: float) -> str:
        """A cost as text for people, with its unit."""
        return f"{digits(cost)} ms/token"


@dataclass(frozen=True)
class Throughput(Timed):
    """Generated tokens per second, summed over all sequences. The cost is the inverse: seconds per token.

    A lower cost must mean a smaller model, as for every metric. So a budget of 1200tokens/s is a cost of 1/1200, and a
    share of 0.75 means 0.75 of the parent's seconds per token, which is 4/3 of its tokens per second.
    """

    name: ClassVar[str] = "throughput"

    def count(self, config, sizes: Mapping, keep: Callable[[int], object]):
        return self.seconds(config, sizes, keep) / self.table.batch

    def number(self, cost: float) -> str:
        """A cost as short text, for the first value of a range."""
        return digits(1 / cost)

    def text(self, cost: float) -> str:
        """A cost as text for people, with its unit."""
        return f"{digits(1 / cost)} tokens/s"


def as_latency(metric):
    """For a throughput, the latency with the same table and context; every other metric stays as it is.

    A submodel's share of the parent's cost is the same for both.
    """
    return Latency(metric.table, metric.context) if isinstance(metric, Timed) else metric


def digits(value: float) -> str:
    """A number with four significant digits, or with all digits before the decimal point if there are more."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.4g}"


TIMED = {metric.name: metric for metric in (Latency, Throughput)}
