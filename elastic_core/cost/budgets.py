"""The notation of budgets: a share of the parent's cost, a number of parameters, memory, or time. Needs no torch.

==================  ===============================================================================================
0.75                share of the parent's cost, in the metric of the family
9B, 1.2M            number of parameters
16GiB@128k×8        memory in KiB to TiB or KB to TB, for 8 sequences with a context of 128k tokens each
35ms/token          latency; also 0.2s/token
1200tokens/s        throughput, summed over all sequences
==================  ===============================================================================================

``@`` is followed by the context in tokens (k = 1024, M = 1024²), ``×`` or ``x`` by the number of sequences (the batch).
Both are allowed for memory and time. If one is missing, it comes from the section `cost` of params.yaml.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from elastic_core.config import ConfigError, Problems, Require, require
from elastic_core.cost.element_types import ELEMENT_BYTES

COUNTS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
BYTES = {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
BYTES |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}
MILLISECONDS = {"MS/TOKEN": 1, "S/TOKEN": 1000}
RATE = "TOKENS/S"
TIMED_METRICS = ("latency", "throughput")
# Metric of a family → (the kinds of budget that it allows in addition to shares, text of what is allowed).
KINDS_OF_METRIC = {
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
SMALLEST_COUNT = 1000  # a smaller number without unit is no model but a mistyped share, such as 75 or 1.5
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
TOLERANCE = 0.02  # the cost of a submodel may differ from its budget by this share of the budget


@dataclass(frozen=True)
class Budget:
    """A parsed budget: `amount` of `kind`, with the context and batch if they were given.

    `given` is the original text. `amount` is a cost in the unit of `kind`: a share, a number of parameters, bytes,
    milliseconds per token (latency) or seconds per token (throughput).
    """

    given: Spelling
    amount: float
    kind: Literal["share", "parameters", "bytes", "latency", "throughput"]
    context: int | None = None
    batch: int | None = None

    @property
    def is_full(self) -> bool:
        """Whether this is the budget of the parent itself."""
        return self.kind == "share" and self.amount == 1


@dataclass(frozen=True)
class Cost:
    """Section `cost` of params.yaml: the metric in which a family's budgets are counted, and its settings.

    Memory uses all settings but `table`; those that are None have the defaults of `cost.memory.Memory`. Context and
    batch may be given in the budgets instead. Latency and throughput use `table`, a file that `elastic measure` writes,
    and `context` (None: the longest context in the table) and `batch`.
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
    def given(self) -> dict:
        """The settings that are not None, without `metric` and `table`."""
        return {
            name: value for name, value in vars(self).items() if name not in ("metric", "table") and value is not None
        }

    def check(self, require: Require = require) -> None:
        """Raise ConfigError for a setting that the metric does not use, or that has an invalid value."""
        if self.metric == "memory":
            for name, value in self.given.items():
                if name in ("context", "batch", "chunk"):
                    require(value >= 1, name, value, "1 or more")
                else:
                    require(value in ELEMENT_BYTES, name, value, ", ".join(ELEMENT_BYTES))
            return
        for name, value in self.given.items():
            known = self.metric in TIMED_METRICS and name in ("context", "batch")
            if require(known, name, value, f"nothing, as long as metric is {self.metric}"):
                require(value >= 1, name, value, "1 or more")
        has_table = self.metric not in TIMED_METRICS or self.table is not None
        require(has_table, "table", None, f"a file that `elastic measure` writes, as long as metric is {self.metric}")


def parse(given: Spelling, where: str = "budget", names: Iterable[str] = ()) -> Budget:
    """Parse a budget. `where` is the key for messages; `names` are names that are allowed too, for the message only.

    Raises ConfigError for every other notation.
    """
    found = SPELLING.fullmatch(str(given).strip())
    amount = _number(found["number"]) if found else math.nan
    unit = found["unit"].upper() if found else ""
    is_serving = unit in {*BYTES, *MILLISECONDS, RATE}  # only these costs depend on a context and a batch
    has_setting = found is not None and (found["context"] or found["batch"])
    is_typo = unit == "" and 1 < amount < SMALLEST_COUNT
    if (
        not 0 < amount < math.inf
        or is_typo
        or not (is_serving or unit in {"", *COUNTS})
        or (has_setting and not is_serving)
    ):
        known = f"one of {', '.join(names)}, " if names else ""
        raise ConfigError(f"{where}: got {given!r}; allowed: {known}{ALLOWED}")
    if not is_serving:
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
    """The settings of a family's metric: those given in section `cost`, and context and batch from the budgets.

    Raises ConfigError for a budget that the metric cannot count, and for budgets with different contexts or batches.
    """
    parsed = {name: parse(given, f"budgets.{name}") for name, given in budgets.items()}
    kinds, allowed = KINDS_OF_METRIC[cost.metric]
    setting, problems = cost.given, Problems()
    for name, budget in parsed.items():
        problems.require(budget.kind in ("share", *kinds), f"budgets.{name}", budget.given, allowed)
        for field in ("context", "batch"):
            if (value := getattr(budget, field)) is not None:
                agreed = f"the {field} of section cost and of the other budgets, {setting.get(field)}"
                problems.require(setting.setdefault(field, value) == value, f"budgets.{name}", budget.given, agreed)
    problems.raise_all()
    return setting
