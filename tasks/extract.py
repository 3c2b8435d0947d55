"""Stage `extract`: write the submodel of one budget as Hugging Face model directories, in three versions.

The versions have the same sizes but different weights: those of the sorted parent (no training), those after
`train_short`, and those after `train_extended`. If widths differ between layers, the uniform counterpart is written
too, with the weights of the sorted parent: a submodel of the same layers and cost, with equal widths in all layers.
"""

import json
from pathlib import Path

import torch

from elastic_core import extract
from elastic_core.config import ConfigError
from elastic_core.cost.metrics import read_metric
from elastic_core.errors import UserError
from elastic_core.export import elastic_checkpoint, hub, model_card
from elastic_core.io import storage
from elastic_core.io.atomic import write_text
from elastic_core.io.directory_transfer import upload_directory
from elastic_core.model import hf
from elastic_core.model.submodel import Submodel
from elastic_core.search.uniform import uniform_counterpart
from tasks.runs import provenance
from tasks.settings import remote_checks
from tasks.settings.load import FILE, load
from tasks.settings.schema import Params

OUT = Path("artifacts/models")
FAMILY = Path("artifacts/train_extended/model")
UNIFORM, FINAL = "uniform", "extended"
NOTES = {"zero_shot": "not trained", "short": "after the first stage", "extended": "after both stages"}
SOURCES = {"zero_shot": Path("artifacts/rank/model"), "short": Path("artifacts/train_short/model"), "extended": FAMILY}


def main(budget: str) -> None:
    """Extract the models of `budget`, a name in section budgets or untrained of params.yaml."""
    settings = load()
    remote_checks.check(settings, "extract")
    section = settings.extract
    submodel, dtype = find_submodel(settings, budget), getattr(torch, section.dtype) if section.dtype else None
    for version, source in SOURCES.items():
        out = OUT / budget / version
        extract(source, submodel, out, section.heterogeneous, dtype, name=f"{budget}, {NOTES[version]}")
        if version == "zero_shot":
            write_records(out)
        if section.destination is not None:
            print(f"{out}: copied to {copy(out, section.destination, budget, version)}")
    print(f"{OUT / budget}: {submodel}")
    uniform = find_uniform_counterpart(submodel)
    if uniform is not None:
        extract(SOURCES["zero_shot"], uniform, OUT / budget / UNIFORM, dtype=dtype, name=f"{budget}, {UNIFORM}")
        write_records(OUT / budget / UNIFORM)
        print(f"{OUT / budget / UNIFORM}: {uniform}")
    write_text(OUT / budget / "submodel.json", json.dumps(submodel.to_dict()) + "\n")  # for the report


def write_records(out: Path) -> None:
    """Write where the weights of a model come from that has seen no training stage, also into its card."""
    records = provenance.read_records("prepare_data", "parent", "rank")
    provenance.write(out, records)
    card = (out / model_card.CARD).read_text(encoding="utf-8")
    write_text(out / model_card.CARD, model_card.with_provenance(card, records))


def copy(out: Path, destination: str, budget: str, version: str) -> str:
    """Copy an extracted model to `destination`, and return where it is.

    On the hub, a budget is a repository. Its main branch has the final version, and each other version is a branch.
    """
    if hub.is_hub(destination):
        revision = None if version == FINAL else version
        return hub.push(out, hub.repository_of(destination, budget), revision=revision, message=f"Version {version}")
    place = storage.join(destination, budget, version)
    upload_directory(out, place)
    return place


def find_submodel(settings: Params, budget: str) -> Submodel:
    """The submodel of a budget: the trained one, or for an untrained budget the nearest one of the elastic checkpoint.

    Raises ConfigError if no submodel is near enough to an untrained budget.
    """
    if budget not in settings.untrained:
        return elastic_checkpoint.find_submodel(FAMILY, budget)
    try:
        return elastic_checkpoint.find_submodel(FAMILY, settings.untrained[budget])
    except UserError as error:
        raise ConfigError(f"{FILE}: untrained.{budget}: {error}") from None


def find_uniform_counterpart(submodel: Submodel) -> Submodel | None:
    """The uniform counterpart of `submodel` in the family's metric, or None if its widths are equal in all layers."""
    config = hf.read_config(FAMILY)
    if submodel.resolve(config).is_homogeneous:
        return None
    return uniform_counterpart(config, submodel, read_metric(elastic_checkpoint.read(FAMILY)["cost"]))
