"""Whether a parent can give what params.yaml asks of it; checked before the depth ranking is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from elastic_core.config import ConfigError, Problems, require
from elastic_core.cost.budgets import TOLERANCE
from elastic_core.cost.latency import Timed
from elastic_core.cost.memory import Memory
from elastic_core.cost.metrics import Metric, exact_cost
from elastic_core.cost.targets import shares
from elastic_core.errors import UserError
from elastic_core.io.storage import StorageError
from elastic_core.model import architectures
from elastic_core.model.parent_files import check_parent_files
from elastic_core.search.importance.basis import check_basis
from elastic_core.search.selection import check_reachable
from elastic_core.search.space import ElasticSpace
from tasks.parents import hub
from tasks.parents.config import read_parent_config
from tasks.parents.targets import comparable_budgets, metric_of_family, resolve
from tasks.settings.budgets import check_shares
from tasks.settings.load import is_sound, raise_problems
from tasks.settings.local_checks import is_package
from tasks.settings.paths import is_hub_name
from tasks.settings.schema import Params


def check_family(params: Params, where: str) -> None:
    """Check budgets and choices against the parent's architecture. Raises ConfigError with all problems.

    Stage train_short checks again, with the order in which depth really drops layers.
    """
    problems = Problems()
    add_family_problems(problems, params)
    raise_problems(problems, where)


def add_family_problems(problems: Problems, params) -> None:
    """The same for the sections that could be read (`params` has them as attributes), with `problems` found before.

    What depends on a parameter that has a problem is left out. Raises StorageError.
    """
    keys = ("parent.path", "parent.rope_scaling", "parent.untie_head", "parent.clamp_time_step")
    if not is_sound(problems, params, *keys):
        return
    if params.parent.path is None and not is_sound(problems, params, "parent.model", "prepare_data.vocab_size"):
        return
    try:
        with problems.collecting():
            vocab_size = None if params.parent.path is not None else params.prepare_data.vocab_size
            add_architecture_problems(problems, params, read_parent_config(params.parent, vocab_size))
    except StorageError:
        raise
    except UserError as error:
        problems.add(f"parent: {error}")


def check_parent(params: Params, where: str) -> None:
    """Check the files of an existing parent, without reading weights. Raises ConfigError and StorageError.

    The values of the weights are checked when the stage `parent` imports them.
    """
    problems = Problems()
    add_parent_problems(problems, params)
    raise_problems(problems, where)


def add_parent_problems(problems: Problems, params) -> None:
    """The same for the sections that could be read, with `problems` found before. Raises StorageError."""
    if not is_sound(problems, params, "parent.path"):
        return
    path = params.parent.path
    if path is None or is_package(path):
        return
    try:
        directory = hub.check(path) if is_hub_name(path) else path
        if directory is not None:  # else weights are downloaded by the stage `parent`
            check_parent_files(directory)
    except StorageError:
        raise
    except UserError as error:
        problems.add(f"parent.path: {error}")


def check_architecture(params: Params, config) -> None:
    """The same as `check_family` for a parent's configuration that has been read. Raises ConfigError."""
    problems = Problems()
    add_architecture_problems(problems, params, config)
    problems.raise_all()


def add_architecture_problems(problems: Problems, params, config) -> None:
    """The same for the sections that could be read, with `problems` found before."""
    sound = {name: is_sound(problems, params, name, "cost", "budgets") for name in ("budgets", "untrained", "choices")}
    has_choices, targets = is_sound(problems, params, "choices"), None
    _add_lengths(problems, params, config)
    _add_stage_problems(problems, params, config)
    if is_sound(problems, params, "rank.basis") and params.rank.basis == "principal":
        with problems.collecting():
            check_basis(config)
    if is_sound(problems, params, "choices.heterogeneous", "extract.heterogeneous"):
        _add_export_problem(problems, params, config)
    if sound["budgets"]:
        with problems.collecting():
            targets = resolve(params, config)
    if sound["untrained"]:
        with problems.collecting():
            metric = metric_of_family(params)
            shares(params.untrained, metric, config, "untrained")
            untrained = shares(comparable_budgets(params), metric, config, "untrained")
            if targets is not None:
                check_shares(params.budgets, params.untrained, targets, untrained)
    if has_choices:
        with problems.collecting():
            if sound["choices"] and targets is not None:
                _check_choices(params, metric_of_family(params), config, targets)
            else:  # the sizes alone
                ElasticSpace(config, params.choices, tuple(range(architectures.num_layers(config))))


def _add_export_problem(problems: Problems, params, config) -> None:
    if architectures.of(config).MODELING_FILE is None and params.choices.heterogeneous:
        allowed = f"pad, as long as choices.heterogeneous is set for a parent of model_type {config.model_type}"
        problems.require(params.extract.heterogeneous == "pad", "extract.heterogeneous", "remote_code", allowed)
    others = [name for name in params.choices.heterogeneous if name != "intermediate_size"]
    allowed = f"remote_code, as long as choices.heterogeneous has {', '.join(others)}: only MLP widths can be padded"
    problems.require(not others or params.extract.heterogeneous != "pad", "extract.heterogeneous", "pad", allowed)


def check_lengths(params: Params, config) -> None:
    """Refuse sequences that are longer than the parent's position embeddings. Raises ConfigError."""
    problems = Problems()
    _add_lengths(problems, params, config)
    problems.raise_all()


def _add_lengths(problems: Problems, params, config) -> None:
    longest = architectures.max_positions(config)
    if longest is None:
        return
    allowed = f"up to {longest:,}, the parent's max_position_embeddings; for longer texts set parent.rope_scaling"
    for name in ("rank", "train_short", "train_extended", "evaluate"):
        if is_sound(problems, params, key := f"{name}.sequence_length"):
            length = getattr(params, name).sequence_length
            problems.require(length <= longest, key, length, allowed)
    if is_sound(problems, params, "evaluate.lengths"):
        for length in params.evaluate.lengths or ():
            problems.require(length <= longest, "evaluate.lengths", length, allowed)


def _add_stage_problems(problems: Problems, params, config) -> None:
    """What a stage would say itself when it begins, which may be after days of other stages."""
    for name in ("train_short", "train_extended"):
        if not is_sound(problems, params, name):
            continue
        stage = getattr(params, name)
        if stage.teacher == "cached":
            allowed = f"below the size of the vocabulary ({config.vocab_size:,})"
            problems.require(stage.kept_logits < config.vocab_size, f"{name}.kept_logits", stage.kept_logits, allowed)
        if is_sound(problems, params, "compute.execution.context_parallel"):
            sharing = params.compute.execution.context_parallel
            smallest, length = architectures.smallest_part(config), stage.sequence_length
            allowed = f"{smallest} tokens or more for each of the workers that share it (context_parallel: {sharing})"
            problems.require(sharing == 1 or length >= sharing * smallest, f"{name}.sequence_length", length, allowed)


def _check_choices(params: Params, metric: Metric, config, targets: Mapping[str, float]) -> None:
    """Refuse budgets that cannot be met whichever layers depth drops, as far as that is known before the ranking."""
    if isinstance(metric, Memory | Timed):
        _check_smallest(params, metric, config, targets)
        return
    problems = []
    for space in _extreme_spaces(metric, params, config):
        try:
            check_reachable(space, targets)
        except ConfigError as error:
            problems.append(error)
    if len(problems) == 2:  # neither when the largest layers go first nor when the smallest do
        raise problems[0]


def _check_smallest(params: Params, metric: Metric, config, targets: Mapping[str, float]) -> None:
    """Refuse memory or time below what all choices cost at their cheapest, when the costliest layers go first.

    Nothing above is refused: layers differ much in cost, so an order in between may fit where neither end does.
    """
    step = metric
    if isinstance(metric, Memory):
        step = dataclasses.replace(metric, chunk=1)  # activations are a maximum, not a sum over layers
    space, _ = _extreme_spaces(step, params, config)
    smallest, full = space.grid_costs().min().item(), exact_cost(metric, config)
    allowed = (
        f"{metric.number(smallest)}, with all choices at their cheapest, to {metric.text(full)} ({metric.setting})"
    )
    for name, target in targets.items():
        enough = target * full * (1 + TOLERANCE) >= smallest
        require(enough, f"budgets.{name}", params.budgets[name], allowed)


def _extreme_spaces(metric: Metric, params: Params, config) -> list[ElasticSpace]:
    """The choices when depth drops the costliest layers first, and when it drops the cheapest first."""
    layers = range(architectures.num_layers(config))
    costs = {layer: metric.count(config, {}, keep=lambda other, layer=layer: int(other == layer)) for layer in layers}
    orders = (sorted(layers, key=costs.get), sorted(layers, key=costs.get, reverse=True))
    return [ElasticSpace(config, params.choices, tuple(order), "choices", metric) for order in orders]
