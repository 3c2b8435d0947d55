"""`elastic plan`: estimates what the training of a profile takes. Needs only the parent's config.json.

The plan has the sizes of the family, the memory of a worker, FLOPs and hours, as plain values. It makes no weights and
runs nothing.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from elastic_core.config import ConfigError, Problems
from elastic_core.cost import budgets
from elastic_core.cost.latency import Timed, as_latency
from elastic_core.cost.memory import Memory
from elastic_core.cost.metrics import Metric, exact_cost
from elastic_core.data.loader import TokenData, mean_document_length
from elastic_core.errors import UserError
from elastic_core.io import storage
from elastic_core.io.json_files import read_json
from elastic_core.model import architectures, hf
from elastic_core.model.submodel import Submodel
from elastic_core.search.selection import (
    check_reachable,
    combinations_with_room,
    equal_log_probs,
    nested_family,
    select,
)
from elastic_core.search.space import ElasticSpace
from tasks.commands.inspect import describe_member
from tasks.commands.plan_stages import (
    Hardware,
    describe_rank,
    describe_stage,
    describe_work,
    stages_of,
    use_gpus,
)
from tasks.commands.planning.changes import describe_changes
from tasks.parents.config import as_used, new_config, read_config
from tasks.parents.targets import metric_of_family, resolve
from tasks.runtime.preflight import check_architecture
from tasks.settings.load import read
from tasks.settings.local_checks import check_parent, is_package
from tasks.settings.merging import ROOT, file_of, parameters, read_override
from tasks.settings.paths import is_hub_name
from tasks.settings.profiles import working_directory, workspace_of
from tasks.settings.schema import Params

TOLERANCE = 0.01  # a planned member may differ from its budget by this share of it; a run allows more
PARENTS = ROOT / "profiles" / "parents"  # the config.json of some parents
DATA = Path("artifacts/data")  # of stage prepare_data, in a workspace
DECIDE_DATA = ("seed", "prepare_data", "parent")  # the sections with parameters of prepare_data


def plan_profile(
    profile: str, overrides: Iterable[str], gpus: int | None, hardware: Hardware, config: Path | None = None
) -> dict:
    """The plan of a profile.

    overrides: ``section.key=value`` for its parameters.
    gpus: the number of workers, with one GPU each; None keeps the profile's workers.
    config: the parent's config.json; None reads the profile's parent.

    Raises ConfigError or UserError for what the user has to change.
    """
    changes = [] if gpus is None else [f"compute.workers={gpus}", "compute.gpus_per_worker=1"]
    values = parameters(profile, overrides=[*overrides, *changes])
    config = config and config.absolute()
    with contextlib.chdir(working_directory(profile, overrides=overrides)):  # as in a run
        settings = read(values, file_of(profile))
        if is_package(settings.parent.path):
            check_parent(settings.parent.path, f"{file_of(profile)}: parent.path")
        return make_plan(settings, *read_parent(settings, config), hardware, find_data(profile, overrides))


def make_plan(settings: Params, config, source: str, hardware: Hardware, data: Path | None) -> dict:
    """The whole plan, as plain values.

    source: where the parent's `config` was read, for the output. data: the directory that prepare_data writes, if any.

    `counted` is the family's metric. Costs are in its unit: a number of parameters, bytes if `memory` is set, or
    milliseconds per token if `time` is set. `deviation` is the member's distance from its target, as a share of the
    target. Raises ConfigError for a budget that no combination of `choices` reaches.
    """
    targets, metric = resolve(settings, config), metric_of_family(settings)
    members, assumption, ranges = find_members(settings, config, targets)
    check_architecture(settings, config)  # the same check as in a run
    metric = as_latency(metric)
    full = exact_cost(metric, config)
    lengths, reason = document_lengths(settings, data)
    stages = {
        name: {
            **describe_stage(name, settings, config, members, hardware, lengths[name]),
            **describe_changes(name, settings, config, hardware),
        }
        for name in stages_of(settings)
    }
    rank = describe_rank(settings, config, hardware)
    return {
        "parent": {"config": source, "cost": full, **describe_member(config, Submodel())},
        "counted": metric.name,
        "memory": {"setting": metric.setting} if isinstance(metric, Memory) else None,
        "time": {"setting": metric.setting} if isinstance(metric, Timed) else None,
        "assumption": assumption,
        "budgets": {
            name: {
                "given": settings.budgets[name],
                "target": targets[name],
                "cost": exact_cost(metric, config, submodel),
                "deviation": exact_cost(metric, config, submodel) / (targets[name] * full) - 1,
                "range": ranges[name],
                **describe_member(config, submodel),
            }
            for name, submodel in members.items()
        },
        "documents": {"data": data and str(data), "unknown_because": reason},
        "hardware": {**dataclasses.asdict(hardware), "usable": hardware.usable},
        "stages": stages,
        "rank": rank,
        "fits": rank["fits"] and all(stage["fits"] for stage in stages.values()),
    }


def read_parent(settings: Params, config: Path | None = None):
    """The parent's configuration as it is used, and where it was read.

    It is read from `config` if given, else from the profile's parent: for a parent that is not on this machine from
    profiles/parents, if that has it (see `ready_directory`). Raises ConfigError if it cannot be read.
    """
    found, source = _find_parent(settings, config)
    return as_used(found, settings.parent), source


def _find_parent(settings: Params, config: Path | None):
    if config is not None:
        directory = config.parent if config.name == "config.json" else config
        return hf.read_config(directory), str(config)
    path = settings.parent.path
    if path is None:
        return new_config(settings.parent.model, settings.prepare_data.vocab_size), "parent.model"
    if (ready := ready_directory(path)) is not None:
        return hf.read_config(ready), str(ready.relative_to(ROOT) / "config.json")
    try:
        return read_config(path), path
    except ConfigError:
        raise
    except UserError as error:
        known = ", ".join(sorted(directory.name for directory in PARENTS.iterdir()))
        raise ConfigError(
            f"parent.path: {error}; give --config a config.json, or name one in profiles/parents ({known})"
        ) from None


def ready_directory(path: str) -> Path | None:
    """The directory in profiles/parents for a parent that is not on this machine; None if none fits.

    For a model of the hub it has the model's whole name in config.json; other paths are found by their last name. A
    revision is not looked for there.
    """
    if is_package(path) or storage.is_url(path) or (Path(path) / "config.json").is_file():
        return None
    if is_hub_name(path):
        files = PARENTS.glob("*/config.json")
        return next((file.parent for file in files if read_json(file).get("_name_or_path") == path), None)
    directory = PARENTS / path.rstrip("/").rpartition("/")[2]
    return directory if directory.is_dir() else None


def check_time_limits(settings: Params, config) -> None:
    """Refuse time limits of training stages that are shorter than the plan. Raises ConfigError.

    Hours are those of H100s at 40 % of their peak, the default of `elastic plan`. On CPUs, no hours are planned. The
    lengths of documents may be unknown yet, so this counts the least that attention can cost: documents of one token.
    Budgets are met as a run meets them. Where that depends on the ranking, the hours are not known and not compared.
    """
    limits = {name: limit for name, limit in settings.time_limits.items() if name in stages_of(settings)}
    if not limits or not use_gpus(settings.compute):
        return
    problems, hardware = Problems(), Hardware()
    targets = resolve(settings, config)
    try:
        members, _, _ = find_members(settings, config, targets, budgets.TOLERANCE)
    except ConfigError:  # in no order of layers that a plan assumes
        return
    for name, limit in limits.items():
        hours = describe_work(name, settings, config, members, hardware, document_length=1.0)["hours"]
        allowed = f"{hours:,.1f} hours or more, which H100s need at {hardware.utilisation:.0%} of their peak"
        problems.require(limit >= hours, f"time_limits.{name}", limit, allowed)
    problems.raise_all()


# --- the documents ---------------------------------------------------------------------------------------------------


def find_data(profile: str, overrides: Iterable[str]) -> Path:
    """The directory that prepare_data writes, or has written, in a run of this profile.

    If a run with these overrides has none, and if they change no parameter of prepare_data: the one of the profile.
    """
    data = workspace_of(profile, overrides=overrides) / DATA
    if data.is_dir() or any(read_override(text)[0][0] in DECIDE_DATA for text in overrides):
        return data
    return workspace_of(profile) / DATA


def document_lengths(settings: Params, data: Path | None) -> tuple[dict[str, float | None], str | None]:
    """Training stage → mean length of its documents (see `mean_document_length`), and None.

    If the directory `data` does not tell them: every length is None, and the reason.
    """
    stages = stages_of(settings)
    if data is None or not data.is_dir():
        return dict.fromkeys(stages), "prepare_data has not run"
    try:
        tokens = TokenData(data)
        return {
            name: mean_document_length(tokens, stage.mixture, stage.sequence_length) for name, stage in stages.items()
        }, None
    except UserError as error:
        return dict.fromkeys(stages), str(error)


# --- the family ------------------------------------------------------------------------------------------------------


def find_members(
    settings: Params, config, targets: Mapping[str, float], tolerance: float = TOLERANCE
) -> tuple[dict[str, Submodel], dict, dict[str, tuple[float, float]]]:
    """For every target: the nested submodel with the nearest cost, the assumptions, and the cost's range.

    targets: budget → share of the parent's cost, largest first. tolerance: of costs, as a share of the target.

    Which layers depth drops is known only after the ranking. The plan therefore assumes an order (see `depth_orders`)
    and takes the first assumption under which all targets can be met. A range is the lowest and the highest cost of the
    same sizes under all assumptions. All axes are assumed to be uniform. Only if that meets the targets in no order,
    the axes in `choices.heterogeneous` have a size per layer. Raises ConfigError if no assumption meets the targets.
    """
    metric = as_latency(metric_of_family(settings))
    orders, uniform = depth_orders(config, metric), dataclasses.replace(settings.choices, heterogeneous=())
    for choices in dict.fromkeys((uniform, settings.choices)):
        spaces = {name: ElasticSpace(config, choices, order, metric=metric) for name, order in orders.items()}
        find = nested_indices if choices == uniform else mixed_indices
        found = {name: find(space, targets, tolerance) for name, space in spaces.items()}
        met = [name for name, indices in found.items() if indices is not None]
        if met:
            break
    else:
        try:
            check_reachable(next(iter(spaces.values())), targets, tolerance)
        except ConfigError as error:
            raise ConfigError(f"{error} (tried with layers dropped {', '.join(spaces)})") from None
    members, ranges = {}, {}
    for name, indices in found[met[0]].items():
        members[name] = spaces[met[0]].submodel(indices)
        costs = [space.exact_cost(indices) for space in spaces.values()]
        ranges[name] = min(costs), max(costs)
    missed = [name for name in spaces if name not in met]
    return members, {"dropped": met[0], "missed": missed, "uniform": choices == uniform}, ranges


def nested_indices(space: ElasticSpace, targets: Mapping[str, float], tolerance: float) -> dict[str, list[int]] | None:
    """Target → index of the choice on every axis. Each submodel lies inside the next larger one.

    None if a target cannot be met.
    """
    equal_log_probs = [torch.zeros(len(slot.sizes)) for slot in space.slots]
    bound = [0] * len(space.slots)
    full, found = space.exact_cost(bound), {}
    allowed = combinations_with_room(space, tuple(targets.values()), tolerance)
    for (name, target), leaves_room in zip(targets.items(), allowed, strict=True):
        bound = select(space, equal_log_probs, target * full, bound, tolerance, leaves_room)
        if bound is None:
            return None
        found[name] = bound
    return found


def mixed_indices(space: ElasticSpace, targets: Mapping[str, float], tolerance: float) -> dict[str, list[int]] | None:
    """`nested_indices` in a space with a choice per layer, as a run selects before its router has learnt anything."""
    family = nested_family(space, tuple(targets.values()), lambda *_: equal_log_probs(space), tolerance)
    return dict(zip(targets, family, strict=True)) if len(family) == len(targets) else None


def depth_orders(config, metric: Metric) -> dict[str, tuple[int, ...]]:
    """Assumption → order of the layers, most important first. Depth drops layers from the end of this order."""
    pattern = architectures.pattern(config)
    layers = range(len(pattern))
    costs = {i: metric.count(config, {}, keep=lambda other, i=i: int(other == i)) for i in layers}
    relative_position = {i: (pattern[:i].count(kind) + 0.5) / pattern.count(kind) for i, kind in enumerate(pattern)}
    return {
        "evenly from all types": tuple(sorted(layers, key=relative_position.get)),
        "the smallest first": tuple(sorted(layers, key=costs.get, reverse=True)),
        "the largest first": tuple(sorted(layers, key=costs.get)),
    }
