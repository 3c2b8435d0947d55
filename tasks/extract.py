"""Stage `extract`: one budget's models as Hugging Face directories: untrained, after stage 1 and after stage 2.

A submodel whose widths differ between layers gets its uniform counterpart beside it, untrained: the submodel of the
same layers and cost whose widths are the same in all layers.
"""

import json
from pathlib import Path

import torch

from elastic_core import extract
from elastic_core.config import ConfigError
from elastic_core.cost.metrics import read_metric
from elastic_core.errors import UserError
from elastic_core.export import elastic_checkpoint
from elastic_core.io import storage
from elastic_core.io.atomic import write_text
from elastic_core.io.directory_transfer import upload_directory
from elastic_core.model import hf
from elastic_core.model.submodel import Submodel
from elastic_core.search.uniform import uniform_counterpart
from tasks.settings import remote_checks
from tasks.settings.load import FILE, load
from tasks.settings.schema import Params

OUT = Path("artifacts/models")
FAMILY = Path("artifacts/train_extended/model")
UNIFORM = "uniform"
SOURCES = {"zero_shot": Path("artifacts/rank/model"), "short": Path("artifacts/train_short/model"), "extended": FAMILY}


def main(budget: str) -> None:
    """Extract the models of `budget`, a name in params.yaml, in budgets or untrained."""
    settings = load()
    remote_checks.check(settings, "extract")
    section = settings.extract
    submodel = find_submodel(settings, budget)
    for version, source in SOURCES.items():
        out = OUT / budget / version
        extract(source, submodel, out, section.heterogeneous, getattr(torch, section.dtype))
        if section.destination is not None:
            copy = storage.join(section.destination, budget, version)
            upload_directory(out, copy)
            print(f"{out}: copied to {copy}")
    print(f"{OUT / budget}: {submodel}")
    uniform = find_uniform_counterpart(submodel)
    if uniform is not None:
        extract(SOURCES["zero_shot"], uniform, OUT / budget / UNIFORM, dtype=getattr(torch, section.dtype))
        print(f"{OUT / budget / UNIFORM}: {uniform}")
    write_text(OUT / budget / "submodel.json", json.dumps(submodel.to_dict()) + "\n")  # for the report


def find_submodel(settings: Params, budget: str) -> Submodel:
    """The submodel trained for a budget; where none was trained, the nearest of the nested ones in between."""
    if budget not in settings.untrained:
        return elastic_checkpoint.find_submodel(FAMILY, budget)
    try:
        return elastic_checkpoint.find_submodel(FAMILY, settings.untrained[budget])
    except UserError as error:
        raise ConfigError(f"{FILE}: untrained.{budget}: {error}") from None


def find_uniform_counterpart(submodel: Submodel) -> Submodel | None:
    """Of the same cost in the family's metric; None where no width of `submodel` differs between layers."""
    config = hf.read_config(FAMILY)
    if submodel.resolve(config).is_homogeneous:
        return None
    return uniform_counterpart(config, submodel, read_metric(elastic_checkpoint.read(FAMILY)["cost"]))
