"""Memory as the family's metric predicts it, beside the budgets and beside what was counted in the built models."""

import dataclasses
import math
from collections.abc import Mapping

from elastic_core.cost import Memory, exact_cost, memory_parts
from elastic_core.submodel import Submodel
from tasks.tables import MIB, Scores

TYPES = {"float32": "float32", "bfloat16": "bf16"}  # torch's names → the metric's


def evaluated(measured: dict) -> Memory:
    """The setting in which tasks.footprint.memory counted bytes: one sequence, all of it in one element type."""
    dtype = TYPES[measured["element_type"]]
    return Memory(measured["cache_tokens"], 1, weights=dtype, cache=dtype, state=dtype, conv_state=dtype)


def columns(scores: Scores, config, metric: Memory, targets: Mapping[str, float]) -> dict[str, list[float]]:
    """For every row of the results, what serving takes in the metric's setting, its budget, and what was to be counted.

    `targets`: shares of the parent's memory by budget; one that is counted in something else is left out.
    """
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


def note(metric: Memory) -> str:
    """The setting in words, of every field that serving depends on."""
    fields = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(metric).items())
    return f"Memory is what budgets are counted in, predicted for serving with {fields}."
