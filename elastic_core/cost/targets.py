"""What a written budget comes to: its metric, and its target as a cost or as a share of the parent."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from elastic_core.config import ConfigError, require
from elastic_core.cost.budgets import Budget, Cost, Spelling, family_setting, parse
from elastic_core.cost.latency import TIMED, Throughput, Timed
from elastic_core.cost.latency_table import REMEDY, Table
from elastic_core.cost.memory import Memory
from elastic_core.cost.metrics import COUNTED, PARAMETERS, Metric, exact_cost
from elastic_core.cost.parameters import Parameters


def metric_of(budget: Budget, own: Metric, where: str = "budget") -> Metric:
    """What a budget is counted in, in a family whose metric is `own`; what the budget leaves open is as in `own`.

    Raises ConfigError for bytes where nothing says the context, and for time where there is no table of it.
    """
    if budget.kind in TIMED:
        return _timed_metric(budget, own, where)
    if budget.kind != "bytes":
        return own if budget.kind == "share" or isinstance(own, Parameters) else PARAMETERS
    said = {name: value for name in ("context", "batch") if (value := getattr(budget, name)) is not None}
    if isinstance(own, Memory):
        return dataclasses.replace(own, **said)
    require("context" in said, where, budget.given, "bytes at a context in tokens, as 16GiB@128k")
    return Memory(**said)


def _timed_metric(budget: Budget, own: Metric, where: str) -> Timed:
    allowed = "no time: nothing has measured it. A family of cost: {metric: latency, table: FILE} has a table of it"
    require(isinstance(own, Timed), where, budget.given, allowed)
    table = own.table
    require(budget.batch in (None, table.batch), where, budget.given, f"×{table.batch} or nothing, as in the table")
    try:
        return TIMED[budget.kind](table, budget.context or own.context)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def target_of(budget: Budget, own: Metric, config, where: str = "budget") -> tuple[Metric, float, float]:
    """The budget's metric, its target in the unit of that metric, and the parent's cost in it."""
    metric = metric_of(budget, own, where)
    full = exact_cost(metric, config)
    return metric, budget.amount * full if budget.kind == "share" else budget.amount, full


def family_metric(cost: Cost, budgets: Mapping[str, Spelling]) -> Metric:
    """The metric in which a family with these budgets is trained; of latency and throughput, with its table.

    Raises ConfigError for a budget that is counted in something else, and for settings that do not agree.
    """
    said = family_setting(cost, budgets)
    if cost.metric in COUNTED:
        return COUNTED[cost.metric]
    if cost.metric in TIMED:
        table = Table.load(cost.table)
        batch = said.get("batch", table.batch)
        require(batch == table.batch, "cost.batch", batch, f"{table.batch}, as in {cost.table}; {REMEDY}")
        try:
            return TIMED[cost.metric](table, said.get("context", table.contexts[-1]))
        except ConfigError as error:
            raise ConfigError(f"cost.{error}") from None
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
            measure, target, full = target_of(budget, metric, config, key)
            setting = f" ({measure.setting})" if measure.setting else ""
            own = f"the parent's own {measure.text(full)}"
            allowed = f"{own} or more" if isinstance(measure, Throughput) else f"up to {own}"
            require(target <= full, key, given, f"{allowed}{setting}")
            found[name] = target / full
    return found
