"""Stage `extract`: one budget's models as Hugging Face directories: untrained, after stage 1 and after stage 2.

A submodel whose widths differ between layers has its even counterpart beside it, untrained: what a family that is cut
alike in all layers would have begun with at the same cost.
"""

import argparse
import json
from pathlib import Path

import torch

from elastic_core import extract
from elastic_core.config import ConfigError
from elastic_core.cost.metrics import read_metric
from elastic_core.export import elastic_checkpoint
from elastic_core.io import storage
from elastic_core.model import hf
from elastic_core.model.submodel import Submodel
from elastic_core.search.uniform import even_counterpart
from tasks.runtime.exit_status import errors_as_text
from tasks.settings import params, remote_checks

OUT = Path("artifacts/models")
FAMILY = Path("artifacts/train_extended/model")
EVEN = "even"
SOURCES = {"zero_shot": Path("artifacts/rank/model"), "short": Path("artifacts/train_short/model"), "extended": FAMILY}


def find_submodel(settings: "params.Params", budget: str) -> Submodel:
    """The submodel trained for a budget; where none was trained, the nearest of the nested ones in between."""
    if budget not in settings.untrained:
        return elastic_checkpoint.find_submodel(FAMILY, budget)
    try:
        return elastic_checkpoint.find_submodel(FAMILY, settings.untrained[budget])
    except ValueError as error:
        raise ConfigError(f"{params.FILE}: untrained.{budget}: {error}") from None


def find_even_counterpart(submodel: Submodel) -> Submodel | None:
    """Of the same cost in the family's metric; None where no width of `submodel` differs between layers."""
    config = hf.read_config(FAMILY)
    if submodel.resolve(config).is_homogeneous:
        return None
    return even_counterpart(config, submodel, read_metric(elastic_checkpoint.read(FAMILY)["cost"]))


@errors_as_text()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("budget", help="a name in params.yaml, in budgets or untrained")
    budget = parser.parse_args().budget
    settings = params.load()
    remote_checks.check(settings, "extract")
    section = settings.extract
    submodel = find_submodel(settings, budget)
    for version, source in SOURCES.items():
        out = OUT / budget / version
        extract(source, submodel, out, section.heterogeneous, getattr(torch, section.dtype))
        print(f"{out}: {submodel}")
        if section.destination is not None:
            copy = storage.join(section.destination, budget, version)
            storage.upload_directory(out, copy)
            print(f"{out}: copied to {copy}")
    even = find_even_counterpart(submodel)
    if even is not None:
        extract(SOURCES["zero_shot"], even, OUT / budget / EVEN, dtype=getattr(torch, section.dtype))
        print(f"{OUT / budget / EVEN}: {even}")
    (OUT / budget / "submodel.json").write_text(json.dumps(submodel.to_dict()) + "\n")  # for the report


if __name__ == "__main__":
    main()
