"""`elastic plan`: what a profile's training will take, before anything is there but the parent's config.json.

Sizes of the family, memory of a worker, operations and hours, as plain values; no weight is made and nothing is run.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch

from elastic_core import hf, storage
from elastic_core.choices import ElasticSpace
from elastic_core.config import ConfigError
from elastic_core.cost import num_parameters
from elastic_core.layout import block_pattern, count, layer_index, parameter_layout
from elastic_core.selection import check_budgets, select
from elastic_core.submodel import Submodel
from tasks import params
from tasks.inspect_checkpoint import member
from tasks.params import Params
from tasks.parent import model_config
from tasks.plan_stages import Hardware, describe_rank, describe_stage, stages_of
from tasks.workspace import ROOT, parameters

TOLERANCE = 0.01  # of a budget
PARENTS = ROOT / "profiles" / "parents"


def plan_profile(
    profile: str, overrides: Iterable[str], gpus: int | None, hardware: Hardware, config: Path | None = None
) -> dict:
    """The plan of a profile, with overrides as `tasks.workspace.prepare` takes them; `gpus`: workers with one each."""
    changes = [] if gpus is None else [f"compute.workers={gpus}", "compute.gpus_per_worker=1"]
    settings = params.read(parameters(profile, overrides=[*overrides, *changes]), f"profile {profile}")
    return make_plan(settings, *read_parent(settings, config), hardware)


def make_plan(settings: Params, config, source: str, hardware: Hardware) -> dict:
    """The whole plan, as plain values; `source` says where the parent's `config` is from.

    Raises ConfigError for a budget that no combination of `choices` meets, and for workers that cannot be grouped.
    """
    members, assumption, ranges = find_members(settings, config)
    full, pieces = num_parameters(config), {}
    stages = {name: describe_stage(name, settings, config, members, hardware, pieces) for name in stages_of(settings)}
    rank = describe_rank(config, hardware)
    return {
        "parent": {"config": source, **member(config, Submodel())},
        "assumption": assumption,
        "budgets": {
            name: {
                "target": settings.budgets[name],
                "deviation": num_parameters(config, submodel) / (settings.budgets[name] * full) - 1,
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
    in a directory of the same name.
    """
    if config is not None:
        directory = config.parent if config.name == "config.json" else config
        return hf.read_config(directory), str(config)
    path = settings.parent.path
    if path is None:
        return model_config(settings.parent.model, settings.prepare_data.vocab_size), "parent.model"
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


def find_members(settings: Params, config) -> tuple[dict[str, Submodel], dict, dict[str, tuple[int, int]]]:
    """The nearest nested submodel to every budget, what was assumed of depth, and how far its count depends on that.

    Which layers depth drops is known after the ranking. Until then they are taken evenly from all types of layers, or
    where budgets cannot be met so, the smallest or the largest first; ranges are of the same sizes over all three.
    Axes that choose per layer are taken to choose alike. Raises ConfigError where no assumption meets the budgets.
    """
    choices = dataclasses.replace(settings.choices, heterogeneous=())
    spaces = {name: ElasticSpace(config, choices, order) for name, order in depth_orders(config).items()}
    found = {name: nested_indices(space, settings.budgets) for name, space in spaces.items()}
    met = [name for name, indices in found.items() if indices is not None]
    if not met:
        check_budgets(next(iter(spaces.values())), settings.budgets, TOLERANCE)
    members, ranges = {}, {}
    for name, indices in found[met[0]].items():
        members[name] = spaces[met[0]].submodel(indices)
        counts = [space.num_parameters(indices) for space in spaces.values()]
        ranges[name] = min(counts), max(counts)
    return members, {"dropped": met[0], "missed": [name for name in spaces if name not in met]}, ranges


def nested_indices(space: ElasticSpace, budgets: dict[str, float]) -> dict[str, list[int]] | None:
    """Choice indices of every budget, each nearest to its target inside the next larger one; None if one has none."""
    uniform = [torch.zeros(len(slot.sizes)) for slot in space.slots]
    bound = [0] * len(space.slots)
    full, found = space.num_parameters(bound), {}
    for name, target in sorted(budgets.items(), key=lambda item: -item[1]):
        bound = select(space, uniform, target * full, bound, TOLERANCE)
        if bound is None:
            return None
        found[name] = bound
    return found


def depth_orders(config) -> dict[str, tuple[int, ...]]:
    """Rankings of the layers, most important first, by which kinds of layers they would drop first."""
    sizes: dict[int, int] = {}
    for name, dims in parameter_layout(config).items():
        if (layer := layer_index(name)) is not None:
            sizes[layer] = sizes.get(layer, 0) + count({name: dims}, {}, keep=lambda _: 1)
    pattern = block_pattern(config)
    place = {i: (pattern[:i].count(kind) + 0.5) / pattern.count(kind) for i, kind in enumerate(pattern)}
    return {
        "evenly from all types": tuple(sorted(sizes, key=place.get)),
        "the smallest first": tuple(sorted(sizes, key=sizes.get, reverse=True)),
        "the largest first": tuple(sorted(sizes, key=sizes.get)),
    }
