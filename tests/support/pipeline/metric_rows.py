"""Rows of metrics as a training stage yields them."""

import math

from elastic_core.training.stage import Stage

GIB = 2**30


NAN = math.nan


def stage(steps=1000, **changes) -> Stage:
    """40 tokens a step."""
    return Stage(sequence_length=10, batch_size=4, steps=steps, learning_rate=1e-3, mixture={"prose": 1.0}, **changes)


def row(step: int, mode="soft", budget="full", loss=2.0, kl=0.5, error=0.013, **changes) -> dict:
    """What train yields after a step."""
    numbers = {"loss": loss, "ce": loss, "kl": kl}
    return {
        "step": step,
        "tokens": 40 * step,
        "mode": mode,
        "learning_rate": 1e-3,
        "grad_norm": 0.7,
        "seconds": 0.1,
        "skipped": 0,
        "memory_bytes": 3 * GIB,
        "budgets": {budget: numbers | {"budget_error": error}},
        "microbatches": [{"budget": budget, **numbers, "cost": None}],
    } | changes
