"""`elastic extract` and `elastic push`: write a member of a family as a Hugging Face directory, and upload one."""

import time
from collections.abc import Mapping
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
from elastic_core.export import elastic_checkpoint, hub, model_card
from elastic_core.io.json_files import read_json
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
        family,
        find_budget(family, budget, nearest),
        out,
        heterogeneous,
        getattr(torch, dtype) if dtype else None,
        budget,
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


def push(directory: Path, repository: str, private: bool = True, revision: str | None = None) -> str:
    """Upload a model directory to "owner/name" on the hub, with its model card; see `hub.push`. Returns the URL.

    An elastic checkpoint gets a card, unless it has one. Where the directory is part of a run that has evaluated it,
    the card has the results. Raises UserError and StorageUnavailable.
    """
    card, replaced = directory / model_card.CARD, {}
    is_family = (directory / elastic_checkpoint.FILE).is_file()
    if card.is_file() or is_family:
        text = card.read_text(encoding="utf-8") if card.is_file() else model_card.card_of_family(directory)
        if results := find_results(directory):
            text = model_card.with_section(text, "Results", results)
        replaced[model_card.CARD] = text.encode()
    message = f"Upload {'an elastic checkpoint' if is_family else 'a model'}"
    return hub.push(directory, repository, private, revision, message, replaced)


def find_results(directory: Path) -> str | None:
    """A table of the scores of a model in the run that it is part of, or None. For a family: of all its budgets."""
    directory = directory.resolve()
    *_, place, name, version = ("", "", *directory.parts)
    if place == "models":  # artifacts/models/BUDGET/VERSION
        files = [directory.parents[2] / "evaluate" / f"{name}.json"]
    elif (name, version) == ("train_extended", "model"):
        files, version = sorted((directory.parents[1] / "evaluate").glob("*.json")), "extended"
    else:
        return None
    files = [file for file in files if file.is_file() and file.stem != "parent"]
    found = {file.stem: read_json(file).get(version) for file in files}
    columns = {name: scores_of(scores) for name, scores in found.items() if scores is not None}
    if not columns:
        return None
    names = dict.fromkeys(name for scores in columns.values() for name in scores)
    rows = [(name, *(scores.get(name, "") for scores in columns.values())) for name in names]
    return "On held-out text and tasks of the run.\n\n" + model_card.table(("", *columns), rows)


def scores_of(scores: Mapping) -> dict[str, str]:
    """The scores of one model, as text: losses in nats per token, and the share of correct items per task."""
    named = {
        "loss": "held-out loss (nats per token)",
        "bits_per_byte": "bits per byte",
        "kl_to_parent": "KL to the parent",
    }
    found = {title: f"{scores[name]:.3f}" for name, title in named.items() if isinstance(scores.get(name), float)}
    for name, task in scores.get("tasks", {}).items():
        found[name] = f"{task['exact_match']:.3f} ± {task['standard_error']:.3f} (chance {task['chance']:.3f})"
    return found
