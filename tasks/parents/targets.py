"""Turns the budgets of params.yaml into shares of the parent's cost.

In all functions `config` is the parent's configuration, and ConfigError means that a budget does not fit the parent or
the metric.
"""

from __future__ import annotations

from elastic_core.cost.budgets import Spelling, parse
from elastic_core.cost.latency import as_latency
from elastic_core.cost.metrics import Metric
from elastic_core.cost.targets import family_metric, metric_of, shares
from tasks.settings.schema import Params


def metric_of_family(params: Params) -> Metric:
    """The metric in which the trained budgets are counted. Raises ConfigError, also for a missing latency table."""
    return family_metric(params.cost, params.budgets)


def resolve(params: Params, config) -> dict[str, float]:
    """Trained budget → share of the parent's cost, largest first. Raises ConfigError."""
    targets = shares(params.budgets, metric_of_family(params), config)
    return dict(sorted(targets.items(), key=lambda item: -item[1]))


def resolve_served(params: Params, config) -> dict[str, float]:
    """Budget → share of the parent's cost, for all budgets, trained ones first. Raises ConfigError.

    An untrained budget may be written in another metric. Its share is then a share in that metric.
    """
    return resolve(params, config) | shares(params.untrained, metric_of_family(params), config, "untrained")


def resolve_comparable(params: Params, config) -> dict[str, float]:
    """Budget → share of the parent's cost, for all budgets in the metric of the trained ones. Raises ConfigError."""
    return resolve(params, config) | shares(comparable_budgets(params), metric_of_family(params), config, "untrained")


def comparable_budgets(params: Params) -> dict[str, Spelling]:
    """The untrained budgets, as written, that are counted in the metric of the trained ones. Raises ConfigError.

    Latency and throughput count as one metric, because both come from the same table.
    """
    own = metric_of_family(params)
    return {
        name: given
        for name, given in params.untrained.items()
        if as_latency(metric_of(parse(given), own, f"untrained.{name}")) == as_latency(own)
    }
