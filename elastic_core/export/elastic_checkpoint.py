"""The file ``elastic.json``. Beside the weights, it makes a model directory an elastic checkpoint.

It names the submodel of every trained budget, and submodels in between, which are nested with the trained ones.
"""

import json
import os
from pathlib import Path

from elastic_core.config import load
from elastic_core.cost.budgets import TOLERANCE, parse
from elastic_core.cost.metrics import PARAMETERS, Metric, exact_cost, num_active_parameters, num_parameters, read_metric
from elastic_core.cost.targets import target_of
from elastic_core.errors import UserError, named
from elastic_core.io.atomic import write_text
from elastic_core.io.json_files import read_json
from elastic_core.model import hf, norm_gains
from elastic_core.model.submodel import Submodel, full_submodel
from elastic_core.search.selection import Member

BudgetLike = str | float | Submodel  # a trained budget's name, a target, or a Submodel

FILE = "elastic.json"
SHAPE = {
    **{"cost": (str, dict), "budgets": {str: {"target": float, "submodel": dict}}, "path": [dict]},
    "private_norms?": bool,
}


def write(
    directory: str | os.PathLike,
    config,
    members: dict[str, Member],
    path: list[Submodel],
    metric: Metric = PARAMETERS,
    private_norms: bool = False,
) -> None:
    """Write ``elastic.json`` into a model directory.

    - `members`: the trained submodels by the name of their budget.
    - `path`: submodels between the members (see search/path.py).
    - `metric`: the cost metric. The targets of the members are fractions of the parent's cost in it.
    - `private_norms`: whether the directory has gains of the norms for every budget (norm_gains.py).
    """
    entries = {
        name: {
            "target": member.target,
            "num_parameters": num_parameters(config, member.submodel),
            **_active(config, member.submodel),
            "submodel": member.submodel.to_dict(),
        }
        for name, member in members.items()
    }
    content = {
        "cost": metric.to_json(),
        "parent_num_parameters": num_parameters(config),
        **{f"parent_{name}": number for name, number in _active(config).items()},
        "budgets": entries,
        "path": [submodel.to_dict() for submodel in path],
        "private_norms": private_norms,
    }
    write_text(Path(directory) / FILE, json.dumps(content, indent=1) + "\n")


def _active(config, submodel: Submodel | None = None) -> dict[str, int]:
    """The number of parameters that one token uses, for models with experts. Otherwise empty."""
    active = num_active_parameters(config, submodel)
    return {} if active is None else {"num_active_parameters": active}


def read(directory: str | os.PathLike) -> dict:
    """The content of ``elastic.json``. Raises UserError if the directory has none, or one that does not fit."""
    file = Path(directory) / FILE
    if not file.is_file():
        raise UserError(f"{directory}: no {FILE}, so it has no budgets; give a Submodel, or another directory")
    content = read_json(file, shape=SHAPE)
    with named(file):
        metric = read_metric(content["cost"])
        found = [entry["submodel"] for entry in content["budgets"].values()] + content["path"]
        submodels = [load(Submodel, values, "submodel") for values in found]
    config = hf.read_config(directory)
    with named(file):
        for submodel in submodels:
            exact_cost(metric, config, submodel)
    if content.get("private_norms"):
        members = dict(zip(content["budgets"], submodels, strict=False))  # the path comes after them
        _check_private_norms(directory, config, members)
    return content


def _check_private_norms(directory: str | os.PathLike, config, members: dict[str, Submodel]) -> None:
    """Raise UserError unless the directory has gains of the norms for every member that is not the whole model."""
    if not (Path(directory) / norm_gains.BUDGETS).is_file():
        raise UserError(f"{directory}: no {norm_gains.BUDGETS}, which {FILE} says it has; copy the checkpoint again")
    known = {full_submodel(config), *norm_gains.read(directory, config).submodels.values()}
    if missing := [name for name, submodel in members.items() if submodel.resolve(config) not in known]:
        raise UserError(
            f"{directory}: {norm_gains.BUDGETS} is of another family than {FILE}: it has no gains for the submodel of "
            f"{', '.join(missing)}; copy the checkpoint again"
        )


class OutOfReach(UserError):
    """No submodel of a checkpoint is near enough to a budget, but `find_submodel` can take the nearest one."""


def find_submodel(directory: str | os.PathLike, budget: str | float, nearest: bool = False) -> Submodel:
    """The submodel of an elastic checkpoint for a budget.

    `budget` is the name of a trained budget, or a target in one of these forms:

    - a fraction of the parent's cost in the family's metric: 0.75
    - a number of parameters: 9e9, "9B", "1.2M" (of active parameters, if these are the family's metric)
    - bytes of memory: "16GiB@128k×8" (see `elastic_core.cost.budgets`)
    - time: "35ms/token", if the family has a latency table

    Targets do not need to be in the metric that the family was trained for. The result is the submodel with the nearest
    cost: a trained one, or one in between. Raises UserError for another form, and, unless `nearest`, OutOfReach if the
    target is larger than the parent or no submodel is within the tolerance of it.
    """
    content = read(directory)
    if budget in content["budgets"]:
        return Submodel(**content["budgets"][budget]["submodel"])
    config, names = hf.read_config(directory), ", ".join(content["budgets"])
    own = read_metric(content["cost"])
    metric, target, full = target_of(parse(budget, names=content["budgets"]), own, config)
    members = [Submodel(**entry["submodel"]) for entry in content["budgets"].values()]
    candidates = [full_submodel(config), *members, *(Submodel(**values) for values in content["path"])]
    costs = {submodel.resolve(config): exact_cost(metric, config, submodel) for submodel in candidates}
    best = min(costs, key=lambda submodel: abs(costs[submodel] - target))
    if not nearest and (target > full or not abs(costs[best] - target) <= TOLERANCE * target):
        setting = f" ({metric.setting})" if metric.setting else ""
        raise OutOfReach(
            f"budget: got {budget!r} ({metric.text(target)}); allowed: {metric.number(min(costs.values()))} to "
            f"{metric.text(full)}{setting}, or one of {names}; the nearest submodel has {metric.number(costs[best])}"
        )
    return best
