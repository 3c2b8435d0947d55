"""From a parsed budget to its metric and its target, as a cost or as a share of the parent's cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from elastic_core.config import ConfigError, Problems, require
from elastic_core.cost.budgets import Budget, Cost, Spelling, family_setting, parse
from elastic_core.cost.latency import TIMED, Throughput, Timed
from elastic_core.cost.latency_table import REMEDY, Table
from elastic_core.cost.memory import Memory
from elastic_core.cost.metrics import COUNTED, PARAMETERS, Metric, exact_cost
from elastic_core.cost.parameters import Parameters


def metric_of(budget: Budget, default: Metric, where: str = "budget") -> Metric:
    """The metric in which a budget is counted; `default` is the metric of its family.

    Settings that the budget does not give come from `default`. `where` is the key for messages.
    Raises ConfigError for bytes without a context, and for time if the family has no table of latencies.
    """
    if budget.kind in TIMED:
        return _timed_metric(budget, default, where)
    if budget.kind != "bytes":
        return default if budget.kind == "share" or isinstance(default, Parameters) else PARAMETERS
    setting = {name: value for name in ("context", "batch") if (value := getattr(budget, name)) is not None}
    if isinstance(default, Memory):
        return dataclasses.replace(default, **setting)
    require("context" in setting, where, budget.given, "bytes at a context in tokens, as 16GiB@128k")
    return Memory(**setting)


def _timed_metric(budget: Budget, default: Metric, where: str) -> Timed:
    allowed = "a share, a count or bytes; time needs a family with a table, cost: {metric: latency, table: FILE}"
    require(isinstance(default, Timed), where, budget.given, allowed)
    table = default.table
    require(budget.batch in (None, table.batch), where, budget.given, f"×{table.batch} or nothing, as in the table")
    try:
        return TIMED[budget.kind](table, budget.context or default.context)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def target_of(budget: Budget, default: Metric, config, where: str = "budget") -> tuple[Metric, float, float]:
    """The metric of the budget (see `metric_of`), its target and the parent's cost, both in the unit of the metric."""
    metric = metric_of(budget, default, where)
    full = exact_cost(metric, config)
    return metric, budget.amount * full if budget.kind == "share" else budget.amount, full


def family_metric(cost: Cost, budgets: Mapping[str, Spelling]) -> Metric:
    """The metric in which a family with these budgets is trained. For latency and throughput it reads the table.

    Raises ConfigError for a budget that this metric cannot count, for settings that contradict each other, and for a
    missing or invalid table.
    """
    setting = family_setting(cost, budgets)
    if cost.metric in COUNTED:
        return COUNTED[cost.metric]
    if cost.metric in TIMED:
        table = Table.load(cost.table)
        batch = setting.get("batch", table.batch)
        require(batch == table.batch, "cost.batch", batch, f"{table.batch}, as in {cost.table}; {REMEDY}")
        try:
            return TIMED[cost.metric](table, setting.get("context", table.contexts[-1]))
        except ConfigError as error:
            raise ConfigError(f"cost.{error}") from None
    require("context" in setting, "cost.context", None, "tokens, such as 131072, here or in a budget as 16GiB@128k")
    return Memory(**setting)


def shares(budgets: Mapping[str, Spelling], metric: Metric, config, where: str = "budgets") -> dict[str, float]:
    """Every budget as a share of the parent's cost, in the metric of the budget (see `metric_of`).

    Raises ConfigError for a budget above the parent's cost.
    """
    found, problems = {}, Problems()
    for name, given in budgets.items():
        with problems.collecting():
            found[name] = _share(given, metric, config, f"{where}.{name}")
    problems.raise_all()
    return found


def _share(given: Spelling, metric: Metric, config, key: str) -> float:
    budget = parse(given, key)
    if budget.kind == "share":
        return budget.amount
    budget_metric, target, full = target_of(budget, metric, config, key)
    setting = f" ({budget_metric.setting})" if budget_metric.setting else ""
    limit = f"the parent's own {budget_metric.text(full)}"
    allowed = f"{limit} or more" if isinstance(budget_metric, Throughput) else f"up to {limit}"
    require(target <= full, key, given, f"{allowed}{setting}")
    return target / full
