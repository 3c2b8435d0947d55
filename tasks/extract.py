"""Stage `extract`: one budget's models as Hugging Face directories: untrained, after stage 1 and after stage 2."""

import argparse
import json
from pathlib import Path

import torch

from elastic_core import elastic_checkpoint, extract, storage
from elastic_core.config import ConfigError
from elastic_core.submodel import Submodel
from tasks import params, places
from tasks.endings import errors_as_text

OUT = Path("artifacts/models")
FAMILY = Path("artifacts/train_extended/model")
SOURCES = {"zero_shot": Path("artifacts/rank/model"), "short": Path("artifacts/train_short/model"), "extended": FAMILY}


def find_submodel(settings: "params.Params", budget: str) -> Submodel:
    """The submodel trained for a budget; where none was trained, the nearest of the nested ones in between."""
    if budget not in settings.untrained:
        return elastic_checkpoint.find_submodel(FAMILY, budget)
    try:
        return elastic_checkpoint.find_submodel(FAMILY, settings.untrained[budget])
    except ValueError as error:
        raise ConfigError(f"{params.FILE}: untrained.{budget}: {error}") from None


@errors_as_text()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("budget", help="a name in params.yaml, in budgets or untrained")
    budget = parser.parse_args().budget
    settings = params.load()
    places.check(settings, "extract")
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
    (OUT / budget / "submodel.json").write_text(json.dumps(submodel.to_dict()) + "\n")  # for the report


if __name__ == "__main__":
    main()
