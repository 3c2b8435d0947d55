"""`elastic extract`: one member of a family as a Hugging Face directory, wherever the caller wants it."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from elastic_core import cost, extract
from elastic_core.cost import latency
from elastic_core.cost.budgets import parse
from elastic_core.cost.targets import metric_of
from elastic_core.errors import UserError
from elastic_core.export import elastic_checkpoint
from elastic_core.model import hf
from elastic_core.model.submodel import Submodel


@dataclass(frozen=True)
class Export:
    """What was written."""

    submodel: Submodel
    num_parameters: int
    parent_num_parameters: int
    num_bytes: int
    seconds: float
    predicted: str | None  # memory or time that serving takes, with its setting, where budget or family are about it


def export(
    family: Path, budget: str | None, out: Path, heterogeneous: str = "remote_code", dtype: str | None = None
) -> Export:
    """Cut the budget's submodel out of `family` into `out`; ValueError for what the caller has to change."""
    begin = time.monotonic()
    submodel = extract(
        family, find_budget(family, budget), out, heterogeneous, getattr(torch, dtype) if dtype else None
    )
    config = hf.read_config(family)
    num_bytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    counts = cost.num_parameters(config, submodel), cost.num_parameters(config)
    predicted = predict(family, budget, config, submodel)
    return Export(submodel, *counts, num_bytes, time.monotonic() - begin, predicted)


def predict(family: Path, budget: str, config, submodel: Submodel) -> str | None:
    """What serving the submodel takes in the setting of its budget; None where neither that nor the family has one."""
    content = elastic_checkpoint.read(family)
    metric = cost.read_metric(content["cost"])
    if budget not in content["budgets"] and (asked := parse(budget)).kind not in ("share", "parameters"):
        metric = metric_of(asked, metric)
    if isinstance(metric, latency.Timed):
        both = (kind(metric.table, metric.context) for kind in latency.TIMED.values())
        costs = (each.text(cost.exact_cost(each, config, submodel)) for each in both)
        return f"{', '.join(costs)} for {metric.setting}"
    if not isinstance(metric, cost.Memory):
        return None
    return f"{metric.text(cost.exact_cost(metric, config, submodel))} of memory for {metric.setting}"


def find_budget(family: Path, budget: str | None) -> Submodel:
    """The budget's submodel, or an error that lists those which `family` has."""
    names = elastic_checkpoint.read(family)["budgets"]
    if budget is None:
        raise UserError(
            f"--budget: none given; allowed: {', '.join(names)}, a share of the parent as 0.75, a count as 9B, "
            "memory as 16GiB@128k, time as 35ms/token"
        )
    return elastic_checkpoint.find_submodel(family, budget)
