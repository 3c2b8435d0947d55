"""Budgets of params.yaml: what they are counted in, whether they make sense, and whether a parent can give them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from elastic_core.config import ConfigError, require
from elastic_core.cost.budgets import Spelling, family_metric, parse, shares
from elastic_core.cost.latency import Timed, as_latency
from elastic_core.cost.metrics import Memory, Metric, exact_cost
from elastic_core.io import storage
from tasks.parents import gguf

if TYPE_CHECKING:
    from tasks.settings.params import Params


def check_budgets(params: Params) -> None:
    """Check names and spellings; and what they come to, where that needs no parent. Raises ConfigError."""
    require(bool(params.budgets), "budgets", params.budgets, "one or more")
    family_metric(params.cost, params.budgets)
    parsed = []
    for section, budgets in (("budgets", params.budgets), ("untrained", params.untrained)):
        for name in budgets:
            allowed = "names of letters, digits and _, other than parent"
            require(name.isidentifier() and name != "parent", section, name, allowed)
        parsed.append({name: parse(given, f"{section}.{name}") for name, given in budgets.items()})
    for name in params.untrained:
        require(name not in params.budgets, "untrained", name, "names that are not in budgets")
    if all(budget.kind == "share" for budgets in parsed for budget in budgets.values()):
        check_targets(params, *({name: budget.amount for name, budget in budgets.items()} for budgets in parsed))


def check_targets(params: Params, budgets: Mapping[str, float], untrained: Mapping[str, float]) -> None:
    """Check targets, all of them shares of the parent in one metric. Raises ConfigError."""
    for section, given, targets in (("budgets", params.budgets, budgets), ("untrained", params.untrained, untrained)):
        distinct = len(set(targets.values())) == len(targets)
        require(distinct, section, [given[name] for name in targets], "different targets")
    trained = set(budgets.values())
    for name, target in untrained.items():
        allowed = f"a share between the trained {min(trained)} and {max(trained)}, and none of them"
        if parse(params.untrained[name]).kind != "share":
            allowed += f" (this is {target:.4g} of the parent)"
        between = min(trained) < target < max(trained) and target not in trained
        require(between, f"untrained.{name}", params.untrained[name], allowed)


def resolve(params: Params, config) -> dict[str, float]:
    """The trained budgets as shares of the parent's cost, largest first. Raises ConfigError."""
    targets = shares(params.budgets, params.metric, config)
    return dict(sorted(targets.items(), key=lambda item: -item[1]))


def resolve_served(params: Params, config) -> dict[str, float]:
    """All budgets as shares of the parent's cost: an untrained one that is counted in something else, in that."""
    return resolve(params, config) | shares(params.untrained, params.metric, config, "untrained")


def resolve_comparable(params: Params, config) -> dict[str, float]:
    """All budgets that are counted as the trained ones are, as shares of the parent's cost."""
    return resolve(params, config) | shares(_comparable(params), params.metric, config, "untrained")


def _comparable(params: Params) -> dict[str, Spelling]:
    """The untrained budgets that are counted as the trained ones are."""
    return {
        name: given
        for name, given in params.untrained.items()
        if as_latency(parse(given).metric(params.metric, f"untrained.{name}")) == as_latency(params.metric)
    }


def check_family(params: Params, where: str) -> None:
    """Check budgets and choices against the parent's architecture, before the depth ranking is known.

    Raises ConfigError. train_short checks again, with the order in which layers really go.
    """
    from elastic_core.model import hf
    from tasks.parent import model_config

    parent = params.parent
    try:
        if gguf.is_package(parent.path):
            config = gguf.read_config(parent.path)
        elif parent.path:
            config = hf.read_config(parent.path)
        else:
            config = model_config(parent.model, params.prepare_data.vocab_size)
    except (ConfigError, storage.StorageError):
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: parent: {error}") from None
    try:
        check_architecture(params, config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def check_architecture(params: Params, config) -> None:
    """`check_family` of a parent's configuration that was read, wherever that was from. Raises ConfigError."""
    from elastic_core.model import architectures

    if architectures.of(config).MODELING_FILE is None and params.choices.heterogeneous:
        allowed = f"pad, as long as choices.heterogeneous is set for a parent of model_type {config.model_type}"
        require(params.extract.heterogeneous == "pad", "extract.heterogeneous", "remote_code", allowed)
    targets = resolve(params, config)
    shares(params.untrained, params.metric, config, "untrained")
    check_targets(params, targets, shares(_comparable(params), params.metric, config, "untrained"))
    _check_choices(params, config, targets)


def _check_choices(params: Params, config, targets: Mapping[str, float]) -> None:
    """Refuse what cannot be met whichever layers depth drops, as far as that can be told before they are ranked."""
    from elastic_core.search.selection import check_budgets

    if isinstance(params.metric, Memory | Timed):
        _check_smallest(params, config, targets)
        return
    problems = []
    for space in _extreme_spaces(params.metric, params, config):
        try:
            check_budgets(space, targets)
        except ConfigError as error:
            problems.append(error)
    if len(problems) == 2:  # neither where the largest layers go first nor where the smallest do
        raise problems[0]


def _check_smallest(params: Params, config, targets: Mapping[str, float]) -> None:
    """Refuse memory, or time, that is below all choices at their cheapest, where the costliest layers go first.

    And no more: some layers cost much more than others, so that an order in between may fit where neither end does.
    """
    from elastic_core.export.elastic_checkpoint import TOLERANCE

    metric = params.metric
    step = metric
    if isinstance(metric, Memory):
        step = dataclasses.replace(metric, chunk=1)  # activations, a maximum, are no sum of what each layer costs
    space, _ = _extreme_spaces(step, params, config)
    smallest, full = space.grid_costs().min().item(), exact_cost(metric, config)
    allowed = (
        f"{metric.number(smallest)}, with all choices at their cheapest, to {metric.text(full)} ({metric.setting})"
    )
    for name, target in targets.items():
        enough = target * full * (1 + TOLERANCE) >= smallest
        require(enough, f"budgets.{name}", params.budgets[name], allowed)


def _extreme_spaces(metric: Metric, params: Params, config) -> list:
    """The choices where the costliest layers go first, and where the cheapest do."""
    from elastic_core.model import architectures
    from elastic_core.search.space import ElasticSpace

    layers = range(architectures.num_layers(config))
    costs = {layer: metric.count(config, {}, keep=lambda other, layer=layer: int(other == layer)) for layer in layers}
    orders = (sorted(layers, key=costs.get), sorted(layers, key=costs.get, reverse=True))
    return [ElasticSpace(config, params.choices, tuple(order), "choices", metric) for order in orders]
