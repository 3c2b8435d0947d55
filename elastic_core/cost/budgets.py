"""Budgets as people write them: a share of the parent, a number of parameters, memory, or time. Needs no torch.

==================  ===============================================================================================
0.75                share of the parent's cost, in the metric that the family is counted in
9B, 1.2M            parameters
16GiB@128k×8        bytes of memory, in KiB to TiB or KB to TB, at a context of 128k tokens, for 8 sequences
35ms/token          latency; also 0.2s/token
1200tokens/s        throughput of all sequences together
==================  ===============================================================================================

After ``@`` stands the context in tokens (k = 1024, M = 1024²), after ``×`` (or x) the number of sequences. Memory and
time may have both. What is left out is taken from the section `cost`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from elastic_core.config import ConfigError, require
from elastic_core.cost.element_types import ELEMENT_BYTES

COUNTS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
BYTES = {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
BYTES |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}
MILLISECONDS = {"MS/TOKEN": 1, "S/TOKEN": 1000}
RATE = "TOKENS/S"
TIMED_METRICS = ("latency", "throughput")
OWN_KINDS = {
    **dict.fromkeys(
        ("parameters", "active_parameters"),
        (
            ("parameters",),
            "a share or a count of parameters; for bytes, set cost: {metric: memory}, for time {metric: latency}",
        ),
    ),
    "memory": (("bytes",), "a share of the parent's memory, or bytes, as long as cost.metric is memory"),
    "latency": (TIMED_METRICS, "a share of the parent's latency, or time, as long as cost.metric is latency"),
    "throughput": (
        TIMED_METRICS,
        "a share of the parent's seconds per token, or time, as long as cost.metric is throughput",
    ),
}
SMALLEST_COUNT = 1000  # a bare number below is no model, but a share gone wrong, such as 75 or 1.5
TOKENS = {"": 1, "K": 2**10, "M": 2**20}
SPELLING = re.compile(
    r"(?P<number>[\d.]+(e[+-]?\d+)?)\s*(?P<unit>[a-z]*(/[a-z]+)?)\s*"
    r"(@\s*(?P<context>\d+)(?P<tokens>[km]?)\s*)?([×x]\s*(?P<batch>\d+))?",
    re.IGNORECASE,
)
ALLOWED = (
    "a fraction as 0.75, a count as 9B, memory as 16GiB@128k or 16GiB@128k×8 (context × sequences), "
    "time as 35ms/token or 1200tokens/s"
)

Spelling = float | str
TOLERANCE = 0.02  # a submodel is within this share of its budget


@dataclass(frozen=True)
class Budget:
    """A budget that was read: so much of `kind`, and for bytes and time the context and batch where they are said.

    `amount` is a cost: of a throughput, seconds per token.
    """

    given: Spelling
    amount: float
    kind: Literal["share", "parameters", "bytes", "latency", "throughput"]
    context: int | None = None
    batch: int | None = None

    @property
    def is_full(self) -> bool:
        """Whether it is the parent's own architecture."""
        return self.kind == "share" and self.amount == 1


@dataclass(frozen=True)
class Cost:
    """Section `cost` of params.yaml: what a family's budgets are counted in; what is left out is as in `Memory`.

    The context, and the batch, may stand in the budgets instead. Latency and throughput have those two and `table`, a
    file that `elastic profile` writes (no cost for the other metrics); without a context it is the longest
    in the table.
    """

    metric: Literal["parameters", "active_parameters", "memory", "latency", "throughput"] = "parameters"
    context: int | None = None
    batch: int | None = None
    weights: str | None = None
    cache: str | None = None
    state: str | None = None
    conv_state: str | None = None
    activations: str | None = None
    chunk: int | None = None
    table: str | None = None

    @property
    def said(self) -> dict:
        """What is not left out, besides the metric's name and table."""
        return {
            name: value for name, value in vars(self).items() if name not in ("metric", "table") and value is not None
        }

    def check(self) -> None:
        if self.metric == "memory":
            for name, value in self.said.items():
                if name in ("context", "batch", "chunk"):
                    require(value >= 1, name, value, "1 or more")
                else:
                    require(value in ELEMENT_BYTES, name, value, ", ".join(ELEMENT_BYTES))
            return
        for name, value in self.said.items():
            known = self.metric in TIMED_METRICS and name in ("context", "batch")
            require(known, name, value, f"nothing, as long as metric is {self.metric}")
            require(value >= 1, name, value, "1 or more")
        given = self.metric not in TIMED_METRICS or self.table is not None
        require(given, "table", None, f"a file that `elastic profile` writes, as long as metric is {self.metric}")


def parse(given: Spelling, where: str = "budget", names: Iterable[str] = ()) -> Budget:
    """Read a budget. Raises ConfigError with what is allowed: one of `names`, where there are any, or a spelling."""
    found = SPELLING.fullmatch(str(given).strip())
    amount = _number(found["number"]) if found else math.nan
    unit = found["unit"].upper() if found else ""
    served = unit in {*BYTES, *MILLISECONDS, RATE}  # what a context and a batch belong to
    setting = found is not None and (found["context"] or found["batch"])
    absurd = unit == "" and 1 < amount < SMALLEST_COUNT
    if not 0 < amount < math.inf or absurd or not (served or unit in {"", *COUNTS}) or (setting and not served):
        known = f"one of {', '.join(names)}, " if names else ""
        raise ConfigError(f"{where}: got {given!r}; allowed: {known}{ALLOWED}")
    if not served:
        kind = "share" if unit == "" and amount <= 1 else "parameters"
        return Budget(given, amount * COUNTS.get(unit, 1), kind)
    context = int(found["context"]) * TOKENS[found["tokens"].upper()] if found["context"] else None
    batch = int(found["batch"]) if found["batch"] else None
    for name, value in (("context", context), ("batch", batch)):
        require(value != 0, where, given, f"a {name} of 1 or more")
    if unit in BYTES:
        return Budget(given, amount * BYTES[unit], "bytes", context, batch)
    if unit == RATE:
        return Budget(given, 1 / amount, "throughput", context, batch)
    return Budget(given, amount * MILLISECONDS[unit], "latency", context, batch)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # such as 1.2.3
        return math.nan


def family_setting(cost: Cost, budgets: Mapping[str, Spelling]) -> dict:
    """What section `cost` says, and the budgets of context and batch. Raises ConfigError as `family_metric` does."""
    parsed = {name: parse(given, f"budgets.{name}") for name, given in budgets.items()}
    kinds, allowed = OWN_KINDS[cost.metric]
    said = cost.said
    for name, budget in parsed.items():
        require(budget.kind in ("share", *kinds), f"budgets.{name}", budget.given, allowed)
        for field in ("context", "batch"):
            if (value := getattr(budget, field)) is not None:
                agreed = f"the {field} of section cost and of the other budgets, {said.get(field)}"
                require(said.setdefault(field, value) == value, f"budgets.{name}", budget.given, agreed)
    return said
