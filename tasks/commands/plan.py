"""`elastic plan`: what a profile's training will take, before anything is there but the parent's config.json.

Sizes of the family, memory of a worker, operations and hours, as plain values; no weight is made and nothing is run.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from elastic_core.config import ConfigError
from elastic_core.cost.latency import Timed, as_latency
from elastic_core.cost.memory import Memory
from elastic_core.cost.metrics import Metric, exact_cost
from elastic_core.io import storage
from elastic_core.model import architectures, hf
from elastic_core.model.submodel import Submodel
from elastic_core.search.selection import check_budgets, select, with_smaller_ones
from elastic_core.search.space import ElasticSpace
from tasks.commands.inspect import member
from tasks.commands.plan_stages import Hardware, describe_rank, describe_stage, stages_of
from tasks.parents import gguf
from tasks.parents.config import new_config
from tasks.parents.targets import metric_of_family, resolve
from tasks.runtime.preflight import check_architecture
from tasks.settings.load import read
from tasks.settings.local_checks import is_package
from tasks.settings.profiles import ROOT, parameters
from tasks.settings.schema import Params

TOLERANCE = 0.01  # of a budget
PARENTS = ROOT / "profiles" / "parents"


def plan_profile(
    profile: str, overrides: Iterable[str], gpus: int | None, hardware: Hardware, config: Path | None = None
) -> dict:
    """The plan of a profile, with overrides as `tasks.settings.profiles.prepare` takes them; `gpus`: workers with one each."""
    changes = [] if gpus is None else [f"compute.workers={gpus}", "compute.gpus_per_worker=1"]
    values = parameters(profile, overrides=[*overrides, *changes])
    if values["cost"].get("table"):
        values["cost"]["table"] = str(ROOT / values["cost"]["table"])  # wherever this is called
    settings = read(values, f"profile {profile}")
    return make_plan(settings, *read_parent(settings, config), hardware)


def make_plan(settings: Params, config, source: str, hardware: Hardware) -> dict:
    """The whole plan, as plain values; `source` says where the parent's `config` is from.

    Costs are in what budgets are `counted` in: parameters, bytes where `memory` is there, milliseconds per token where
    `time` is. Raises ConfigError for a budget that no combination of `choices` meets, and for workers that cannot be
    grouped.
    """
    targets, metric, pieces = resolve(settings, config), metric_of_family(settings), {}
    members, assumption, ranges = find_members(settings, config, targets)
    check_architecture(settings, config)  # as a run does
    metric = as_latency(metric)
    full = exact_cost(metric, config)
    stages = {name: describe_stage(name, settings, config, members, hardware, pieces) for name in stages_of(settings)}
    rank = describe_rank(config, hardware)
    return {
        "parent": {"config": source, "cost": full, **member(config, Submodel())},
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
                **member(config, submodel),
            }
            for name, submodel in members.items()
        },
        "hardware": {**dataclasses.asdict(hardware), "usable": hardware.usable},
        "stages": stages,
        "rank": rank,
        "fits": rank["fits"] and all(stage["fits"] for stage in stages.values()),
    }


def read_parent(settings: Params, config: Path | None = None):
    """The parent's configuration and where it is from: `config`, parent.path, or a directory in profiles/parents.

    A profile may name a path that is not on this machine; profiles/parents has the config.json of some parents, each
    in a directory of the same name. Raises ConfigError where there is none, and for a package that is not installed.
    """
    if config is not None:
        directory = config.parent if config.name == "config.json" else config
        return hf.read_config(directory), str(config)
    path = settings.parent.path
    if path is None:
        return new_config(settings.parent.model, settings.prepare_data.vocab_size), "parent.model"
    if is_package(path):
        return gguf.read_config(path), path
    ready = PARENTS / path.rstrip("/").rpartition("/")[2]
    if storage.is_url(path) or (Path(path) / "config.json").is_file() or not ready.is_dir():
        try:
            return hf.read_config(path), path
        except ValueError as error:
            known = ", ".join(sorted(place.name for place in PARENTS.iterdir()))
            raise ConfigError(
                f"parent.path: {error}; give --config a config.json, or name one in profiles/parents ({known})"
            ) from None
    return hf.read_config(ready), str(ready.relative_to(ROOT) / "config.json")


# --- the family ------------------------------------------------------------------------------------------------------


def find_members(
    settings: Params, config, targets: Mapping[str, float]
) -> tuple[dict[str, Submodel], dict, dict[str, tuple[float, float]]]:
    """The nearest nested submodel to every target, what was assumed of depth, and how far its cost depends on that.

    Targets are shares of the parent's cost, largest first. Which layers depth drops is known after the ranking. Until
    then they are taken evenly from all types of layers, or where targets cannot be met so, the cheapest or the
    costliest first; ranges are of the same sizes over all three. Axes that choose per layer are taken to choose alike.
    Raises ConfigError where no assumption meets the targets.
    """
    choices, metric = dataclasses.replace(settings.choices, heterogeneous=()), as_latency(metric_of_family(settings))
    orders = depth_orders(config, metric)
    spaces = {name: ElasticSpace(config, choices, order, metric=metric) for name, order in orders.items()}
    found = {name: nested_indices(space, targets) for name, space in spaces.items()}
    met = [name for name, indices in found.items() if indices is not None]
    if not met:
        try:
            check_budgets(next(iter(spaces.values())), targets, TOLERANCE)
        except ConfigError as error:
            raise ConfigError(f"{error} (tried with layers dropped {', '.join(spaces)})") from None
    members, ranges = {}, {}
    for name, indices in found[met[0]].items():
        members[name] = spaces[met[0]].submodel(indices)
        costs = [space.exact_cost(indices) for space in spaces.values()]
        ranges[name] = min(costs), max(costs)
    return members, {"dropped": met[0], "missed": [name for name in spaces if name not in met]}, ranges


def nested_indices(space: ElasticSpace, targets: Mapping[str, float]) -> dict[str, list[int]] | None:
    """Choice indices of every target, each nearest to it inside the next larger one; None if one has none."""
    uniform = [torch.zeros(len(slot.sizes)) for slot in space.slots]
    bound = [0] * len(space.slots)
    full, found = space.exact_cost(bound), {}
    allowed = with_smaller_ones(space, tuple(targets.values()), TOLERANCE)
    for (name, target), leaves_room in zip(targets.items(), allowed, strict=True):
        bound = select(space, uniform, target * full, bound, TOLERANCE, leaves_room)
        if bound is None:
            return None
        found[name] = bound
    return found


def depth_orders(config, metric: Metric) -> dict[str, tuple[int, ...]]:
    """Rankings of the layers, most important first, by which kinds of layers they would drop first."""
    pattern = architectures.pattern(config)
    layers = range(len(pattern))
    costs = {i: metric.count(config, {}, keep=lambda other, i=i: int(other == i)) for i in layers}
    place = {i: (pattern[:i].count(kind) + 0.5) / pattern.count(kind) for i, kind in enumerate(pattern)}
    return {
        "evenly from all types": tuple(sorted(layers, key=place.get)),
        "the smallest first": tuple(sorted(layers, key=costs.get, reverse=True)),
        "the largest first": tuple(sorted(layers, key=costs.get)),
    }
