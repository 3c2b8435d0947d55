"""Budgets as people write them: a share of the parent (0.75), parameters (9B, 1.2M), or memory (16GiB@128k×8).

A share is of the parent's cost in the family's own metric. Memory is bytes in KiB to TiB or KB to TB; behind @ stands
the context in tokens (k = 1024, M = 1024²), behind × (or x) the number of sequences; what is left out is as in
training.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from elastic_core.config import ConfigError, require
from elastic_core.cost import ACTIVE_PARAMETERS, PARAMETERS, Memory, Metric, Parameters, exact_cost

COUNTS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
BYTES = {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
BYTES |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}
SMALLEST_COUNT = 1000  # a bare number below is no model, but a share gone wrong, such as 75 or 1.5
TOKENS = {"": 1, "K": 2**10, "M": 2**20}
SPELLING = re.compile(
    r"(?P<number>[\d.]+(e[+-]?\d+)?)\s*(?P<unit>[a-z]*)\s*"
    r"(@\s*(?P<context>\d+)(?P<tokens>[km]?)\s*)?([×x]\s*(?P<batch>\d+))?",
    re.IGNORECASE,
)
ALLOWED = "a fraction as 0.75, a count as 9B, memory as 16GiB@128k or 16GiB@128k×8 (context × sequences)"

Spelling = float | str


@dataclass(frozen=True)
class Budget:
    """A budget that was read: so much of `kind`, and for bytes the context and batch where they are said."""

    given: Spelling
    amount: float
    kind: Literal["share", "parameters", "bytes"]
    context: int | None = None
    batch: int | None = None

    @property
    def is_full(self) -> bool:
        """Whether it is the parent's own architecture."""
        return self.kind == "share" and self.amount == 1

    def metric(self, own: Metric, where: str = "budget") -> Metric:
        """What this budget is counted in, in a family whose metric is `own`; what it leaves open is as there.

        Raises ConfigError for bytes where nothing says the context.
        """
        if self.kind != "bytes":
            return own if self.kind == "share" or isinstance(own, Parameters) else PARAMETERS
        said = {name: value for name in ("context", "batch") if (value := getattr(self, name)) is not None}
        if isinstance(own, Memory):
            return dataclasses.replace(own, **said)
        require("context" in said, where, self.given, "bytes at a context in tokens, as 16GiB@128k")
        return Memory(**said)

    def target(self, own: Metric, config, where: str = "budget") -> tuple[Metric, float, float]:
        """The metric, the target in its unit, and the parent's cost in it."""
        metric = self.metric(own, where)
        full = exact_cost(metric, config)
        return metric, self.amount * full if self.kind == "share" else self.amount, full


@dataclass(frozen=True)
class Cost:
    """Section `cost` of params.yaml: what a family's budgets are counted in; what is left out is as in `Memory`.

    The context, and the batch, may stand in the budgets instead.
    """

    metric: Literal["parameters", "active_parameters", "memory"] = "parameters"
    context: int | None = None
    batch: int | None = None
    weights: str | None = None
    cache: str | None = None
    state: str | None = None
    conv_state: str | None = None
    activations: str | None = None
    chunk: int | None = None

    @property
    def said(self) -> dict:
        """What is not left out, besides the metric's name."""
        return {name: value for name, value in vars(self).items() if name != "metric" and value is not None}

    def check(self) -> None:
        if self.metric == "memory":
            Memory(**{"context": 1, **self.said})
        for name, value in self.said.items():
            require(self.metric == "memory", name, value, f"nothing, as long as metric is {self.metric}")


def parse(given: Spelling, where: str = "budget", names: Iterable[str] = ()) -> Budget:
    """Read a budget. Raises ConfigError with what is allowed: one of `names`, where there are any, or a spelling."""
    found = SPELLING.fullmatch(str(given).strip())
    amount = _number(found["number"]) if found else math.nan
    unit = found["unit"].upper() if found else ""
    in_bytes = unit in BYTES
    setting = found is not None and (found["context"] or found["batch"])
    absurd = unit == "" and 1 < amount < SMALLEST_COUNT
    if not 0 < amount < math.inf or absurd or unit not in {"", *COUNTS, *BYTES} or (setting and not in_bytes):
        known = f"one of {', '.join(names)}, " if names else ""
        raise ConfigError(f"{where}: got {given!r}; allowed: {known}{ALLOWED}")
    if not in_bytes:
        kind = "share" if unit == "" and amount <= 1 else "parameters"
        return Budget(given, amount * COUNTS.get(unit, 1), kind)
    context = int(found["context"]) * TOKENS[found["tokens"].upper()] if found["context"] else None
    batch = int(found["batch"]) if found["batch"] else None
    for name, value in (("context", context), ("batch", batch)):
        require(value != 0, where, given, f"a {name} of 1 or more")
    return Budget(given, amount * BYTES[unit], "bytes", context, batch)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # such as 1.2.3
        return math.nan


def family_metric(cost: Cost, budgets: Mapping[str, Spelling]) -> Metric:
    """The metric in which a family with these budgets is trained.

    Raises ConfigError for a budget that is counted in something else, and for settings that do not agree.
    """
    parsed = {name: parse(given, f"budgets.{name}") for name, given in budgets.items()}
    if cost.metric != "memory":
        allowed = "a share or a count of parameters; for bytes, set cost: {metric: memory}"
        for name, budget in parsed.items():
            require(budget.kind != "bytes", f"budgets.{name}", budget.given, allowed)
        return PARAMETERS if cost.metric == "parameters" else ACTIVE_PARAMETERS
    said = cost.said
    for name, budget in parsed.items():
        allowed = "a share of the parent's memory, or bytes, as long as cost.metric is memory"
        require(budget.kind != "parameters", f"budgets.{name}", budget.given, allowed)
        for field in ("context", "batch"):
            if (value := getattr(budget, field)) is not None:
                allowed = f"the {field} of section cost and of the other budgets, {said.get(field)}"
                require(said.setdefault(field, value) == value, f"budgets.{name}", budget.given, allowed)
    require("context" in said, "cost.context", None, "tokens, such as 131072, here or in a budget such as 16GiB@128k")
    return Memory(**said)


def shares(budgets: Mapping[str, Spelling], metric: Metric, config, where: str = "budgets") -> dict[str, float]:
    """Every budget as a share of the parent's cost, in `metric` or, where it is counted in something else, in that.

    Raises ConfigError for one above the parent.
    """
    found = {}
    for name, given in budgets.items():
        key = f"{where}.{name}"
        budget = parse(given, key)
        found[name] = budget.amount
        if budget.kind != "share":
            measure, target, full = budget.target(metric, config, key)
            setting = f" ({measure.setting})" if measure.setting else ""
            require(target <= full, key, given, f"up to the parent's own {measure.text(full)}{setting}")
            found[name] = target / full
    return found
