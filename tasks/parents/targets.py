"""The budgets of params.yaml as shares of a parent's cost."""

from __future__ import annotations

from elastic_core.cost.budgets import Spelling, parse
from elastic_core.cost.latency import as_latency
from elastic_core.cost.metrics import Metric
from elastic_core.cost.targets import family_metric, metric_of, shares
from tasks.settings.schema import Params


def metric_of_family(params: Params) -> Metric:
    """What the trained budgets are counted in. Raises ConfigError, also for a table of latencies that is not there."""
    return family_metric(params.cost, params.budgets)


def resolve(params: Params, config) -> dict[str, float]:
    """The trained budgets as shares of the parent's cost, largest first. Raises ConfigError."""
    targets = shares(params.budgets, metric_of_family(params), config)
    return dict(sorted(targets.items(), key=lambda item: -item[1]))


def resolve_served(params: Params, config) -> dict[str, float]:
    """All budgets as shares of the parent's cost; an untrained one that is counted in another metric, in that."""
    return resolve(params, config) | shares(params.untrained, metric_of_family(params), config, "untrained")


def resolve_comparable(params: Params, config) -> dict[str, float]:
    """All budgets that are counted in the metric of the trained ones, as shares of the parent's cost."""
    return resolve(params, config) | shares(comparable_budgets(params), metric_of_family(params), config, "untrained")


def comparable_budgets(params: Params) -> dict[str, Spelling]:
    """The untrained budgets that are counted in the metric of the trained ones."""
    own = metric_of_family(params)
    return {
        name: given
        for name, given in params.untrained.items()
        if as_latency(metric_of(parse(given), own, f"untrained.{name}")) == as_latency(own)
    }
