"""Memory or time as the family's metric predicts it, beside the budgets and beside what was measured of the models."""

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

TYPES = {"float32": "float32", "bfloat16": "bf16"}  # torch's names → the metric's


def evaluated(measured: dict) -> Memory:
    """The setting in which tasks.evaluation.latency_and_memory.memory counted bytes: one sequence, all of it in one element type."""
    dtype = TYPES[measured["element_type"]]
    return Memory(measured["cache_tokens"], 1, weights=dtype, cache=dtype, state=dtype, conv_state=dtype)


def evaluated_time(table: Table, measured: dict, element_type: str) -> Latency | None:
    """The setting in which tasks.evaluation.latency_and_memory.latency measured, on a CPU; None where the table is of another."""
    alike = (table.device, table.batch, table.threads, table.dtype) == ("cpu", 1, measured["threads"], element_type)
    try:
        return Latency(table, measured["prompt_tokens"]) if alike else None
    except ConfigError:  # another context
        return None


def columns(scores: Scores, config, metric: Metric, targets: Mapping[str, float]) -> dict[str, list[float]]:
    """For every row of the results, its cost in the metric's setting, its budget, and what was to be measured.

    `targets`: shares of the parent's cost by budget; one that is counted in something else is left out. Nothing for
    parameters, which are counted anyway.
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
            parts = memory_parts(evaluated(values["memory"]), config, submodel)
            found["budget_mib"].append(targets.get(budget, math.nan) * full / MIB)
            found["serving_mib"].append(exact_cost(metric, config, submodel) / MIB)
            found["predicted_mib"].append((sum(parts.values()) - parts["activations"]) / MIB)
    return found


def note(metric: Metric) -> str:
    """The setting in words, of every field that serving depends on; none for parameters."""
    if isinstance(metric, Timed):
        return f" {metric.name.capitalize()} is what budgets are counted in, predicted for {metric.setting}."
    if not isinstance(metric, Memory):
        return ""
    fields = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(metric).items())
    return f" Memory is what budgets are counted in, predicted for serving with {fields}."
