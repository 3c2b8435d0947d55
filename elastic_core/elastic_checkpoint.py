"""What makes a model directory elastic: ``elastic.json`` beside the weights, naming a submodel per budget."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from elastic_core import hf
from elastic_core.cost import num_parameters
from elastic_core.submodel import Submodel, full_submodel

FILE = "elastic.json"
TOLERANCE = 0.02  # an extracted model is within this share of its budget


@dataclass(frozen=True)
class Member:
    """One budget of the family: its target as a fraction of the parent's parameters, and its submodel."""

    target: float
    submodel: Submodel


def write(directory: str | os.PathLike, config, members: dict[str, Member], path: list[Submodel]) -> None:
    """Write ``elastic.json``: the trained `members`, and `path`, nested submodels in between, largest first."""
    entries = {
        name: {
            "target": member.target,
            "num_parameters": num_parameters(config, member.submodel),
            "submodel": member.submodel.to_dict(),
        }
        for name, member in members.items()
    }
    content = {
        "cost": "parameters",
        "parent_num_parameters": num_parameters(config),
        "budgets": entries,
        "path": [submodel.to_dict() for submodel in path],
    }
    (Path(directory) / FILE).write_text(json.dumps(content, indent=1) + "\n")


def read(directory: str | os.PathLike) -> dict:
    """The content of ``elastic.json``; ValueError where there is none."""
    file = Path(directory) / FILE
    if not file.is_file():
        raise ValueError(f"{directory}: no {FILE}, so it knows no budgets; name a Submodel, or a trained elastic model")
    return json.loads(file.read_text())


def find_submodel(directory: str | os.PathLike, budget: str | float) -> Submodel:
    """The submodel for a budget: a trained budget's name, or a target that need not have been trained.

    A target is a fraction of the parent's parameters (0.75) or an absolute number of them (9e9, "9B", "1.2M"). It is
    served by the nested submodel whose size is nearest, trained or in between.
    """
    content = read(directory)
    if budget in content["budgets"]:
        return Submodel(**content["budgets"][budget]["submodel"])
    config = hf.read_config(directory)
    full = num_parameters(config)
    target = _target(budget, full, content["budgets"])
    members = [Submodel(**entry["submodel"]) for entry in content["budgets"].values()]
    candidates = [full_submodel(config), *members, *(Submodel(**values) for values in content["path"])]
    costs = {submodel.resolve(config): num_parameters(config, submodel) for submodel in candidates}
    smallest = min(costs.values())
    best = min(costs, key=lambda submodel: abs(costs[submodel] - target))
    if target > full or abs(costs[best] / target - 1) > TOLERANCE:
        raise ValueError(
            f"budget: got {budget!r} ({target:,.0f} parameters); allowed: {smallest:,} to {full:,} parameters, or one "
            f"of {', '.join(content['budgets'])}; the nearest submodel has {costs[best]:,}"
        )
    return best


def _target(budget: str | float, full: int, names) -> float:
    """A budget as a number of parameters."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    try:
        text = str(budget).strip()
        value = float(text[:-1]) * units[text[-1].upper()] if text[-1:].upper() in units else float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise ValueError(
            f"budget: got {budget!r}; allowed: one of {', '.join(names)}, a fraction as 0.75, a count as 9B"
        )
    return value * full if value <= 1 else value
