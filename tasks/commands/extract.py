"""`elastic extract`: writes one member of a family as a Hugging Face directory."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from elastic_core import extract
from elastic_core.cost import latency
from elastic_core.cost.budgets import parse
from elastic_core.cost.memory import Memory
from elastic_core.cost.metrics import exact_cost, num_parameters, read_metric
from elastic_core.cost.targets import metric_of
from elastic_core.errors import UserError
from elastic_core.export import elastic_checkpoint
from elastic_core.model import hf
from elastic_core.model.submodel import Submodel


@dataclass(frozen=True)
class Export:
    """What `export` has written: its sizes, and how long the export took in seconds."""

    submodel: Submodel
    num_parameters: int
    parent_num_parameters: int
    num_bytes: int
    seconds: float
    predicted: str | None  # memory or time of serving, with its setting; None if budget and family count parameters


def export(
    family: Path,
    budget: str | None,
    out: Path,
    heterogeneous: str = "remote_code",
    dtype: str | None = None,
    nearest: bool = False,
) -> Export:
    """Extract the submodel of `budget` from the elastic checkpoint `family` into the directory `out`.

    heterogeneous: how to write widths that differ between layers, "remote_code" or "pad".
    dtype: "float32" or "bfloat16"; None takes that of the parent's files.
    nearest: take the nearest submodel, however far its cost is from the budget.

    Raises UserError for what the caller has to change.
    """
    begin = time.monotonic()
    submodel = extract(
        family, find_budget(family, budget, nearest), out, heterogeneous, getattr(torch, dtype) if dtype else None
    )
    config = hf.read_config(family)
    num_bytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    counts = num_parameters(config, submodel), num_parameters(config)
    predicted = predict(family, budget, config, submodel)
    return Export(submodel, *counts, num_bytes, time.monotonic() - begin, predicted)


def predict(family: Path, budget: str, config, submodel: Submodel) -> str | None:
    """The memory or time of serving the submodel, as text, in the setting of the budget or else of the family.

    None if both count parameters.
    """
    content = elastic_checkpoint.read(family)
    metric = read_metric(content["cost"])
    if budget not in content["budgets"] and (asked := parse(budget)).kind not in ("share", "parameters"):
        metric = metric_of(asked, metric)
    if isinstance(metric, latency.Timed):
        metrics = (kind(metric.table, metric.context) for kind in latency.TIMED.values())  # latency and throughput
        costs = (timed.text(exact_cost(timed, config, submodel)) for timed in metrics)
        return f"{', '.join(costs)} for {metric.setting}"
    if not isinstance(metric, Memory):
        return None
    return f"{metric.text(exact_cost(metric, config, submodel))} of memory for {metric.setting}"


def find_budget(family: Path, budget: str | None, nearest: bool = False) -> Submodel:
    """The submodel of a budget: a name in the family, or any spelling of a budget. `nearest`: see `export`.

    Raises UserError, which lists both, for None and for a budget that the family cannot give.
    """
    names = elastic_checkpoint.read(family)["budgets"]
    if budget is None:
        raise UserError(
            f"--budget: none given; allowed: {', '.join(names)}, a share of the parent such as 0.75, "
            "a number of parameters such as 9B, memory such as 16GiB@128k, time such as 35ms/token"
        )
    try:
        return elastic_checkpoint.find_submodel(family, budget, nearest)
    except elastic_checkpoint.OutOfReach as error:
        raise UserError(f"{error}; --nearest takes it") from None
