"""Predicts memory or time in the family's metric, to compare with the budgets and with the measurements."""

import dataclasses
import math
from collections.abc import Mapping

from elastic_core.config import ConfigError
from elastic_core.cost.latency import Latency, Throughput, Timed, as_latency
from elastic_core.cost.latency_table import Table
from elastic_core.cost.memory import Memory
from elastic_core.cost.metrics import Metric, exact_cost, memory_parts
from elastic_core.model.submodel import Submodel
from tasks.reporting.tables import MIB, Scores

TYPES = {"float32": "float32", "bfloat16": "bf16"}  # torch's name → the metric's name


def evaluated_memory(measured: dict) -> Memory:
    """The setting of the evaluation: one sequence, with everything in one element type.

    `measured` is the result of `tasks.evaluation.latency_and_memory.memory`.
    """
    dtype = TYPES[measured["element_type"]]
    return Memory(measured["cache_tokens"], 1, weights=dtype, cache=dtype, state=dtype, conv_state=dtype)


def evaluated_time(table: Table, measured: dict, element_type: str) -> Latency | None:
    """The setting of the evaluation, which runs on a CPU. None if the table was measured in another setting.

    `measured` is the result of `tasks.evaluation.latency_and_memory.latency`.
    """
    is_same = (table.device, table.batch, table.threads, table.dtype) == ("cpu", 1, measured["threads"], element_type)
    try:
        return Latency(table, measured["prompt_tokens"]) if is_same else None
    except ConfigError:  # the table does not have this context
        return None


def columns(scores: Scores, config, metric: Metric, targets: Mapping[str, float]) -> dict[str, list[float]]:
    """Column name → a number per row of the results: the budget, the predicted cost, the predicted measurement.

    targets: budget → share of the parent's cost. Budgets that are missing here have another metric and get NaN.

    Empty if budgets count parameters, because the results have those anyway. Memory is in MiB, latency in milliseconds
    per token, throughput in tokens per second.
    """
    if isinstance(metric, Timed):
        return _time_columns(scores, config, metric, targets)
    return _memory_columns(scores, config, metric, targets) if isinstance(metric, Memory) else {}


def _time_columns(scores: Scores, config, metric: Timed, targets: Mapping[str, float]) -> dict[str, list[float]]:
    full, step = exact_cost(metric, config), as_latency(metric)
    found: dict[str, list[float]] = {name: [] for name in ("budget_time", "serving_ms", "serving_rate")}
    for budget, versions in scores.items():
        for values in versions.values():
            submodel, target = Submodel(**(values["submodel"] or {})), targets.get(budget, math.nan) * full
            found["budget_time"].append(1 / target if isinstance(metric, Throughput) else target)
            found["serving_ms"].append(exact_cost(step, config, submodel))
            found["serving_rate"].append(1000 * metric.table.batch / found["serving_ms"][-1])
            measured = evaluated_time(metric.table, values["latency"], values["memory"]["element_type"])
            if measured is not None:
                found.setdefault("predicted_ms", []).append(exact_cost(measured, config, submodel))
                ratio = found["predicted_ms"][-1] / exact_cost(measured, config)
                found.setdefault("predicted_ratio", []).append(ratio)
    return found


def _memory_columns(scores: Scores, config, metric: Memory, targets: Mapping[str, float]) -> dict[str, list[float]]:
    full = exact_cost(metric, config)
    found: dict[str, list[float]] = {"budget_mib": [], "serving_mib": [], "predicted_mib": []}
    for budget, versions in scores.items():
        for values in versions.values():
            submodel = Submodel(**(values["submodel"] or {}))
            parts = memory_parts(evaluated_memory(values["memory"]), config, submodel)
            found["budget_mib"].append(targets.get(budget, math.nan) * full / MIB)
            found["serving_mib"].append(exact_cost(metric, config, submodel) / MIB)
            found["predicted_mib"].append((sum(parts.values()) - parts["activations"]) / MIB)
    return found


def note(metric: Metric) -> str:
    """A sentence about the metric and its setting. Empty if budgets count parameters."""
    if isinstance(metric, Timed):
        return f" The metric of the budgets is {metric.name}, predicted for {metric.setting}."
    if not isinstance(metric, Memory):
        return ""
    fields = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(metric).items())
    return f" The metric of the budgets is memory, predicted for serving with {fields}."
