"""Stage `extract`: one budget's models as Hugging Face directories: untrained, after stage 1 and after stage 2."""

import argparse
from pathlib import Path

import torch

from elastic_core import elastic_checkpoint, extract, storage
from tasks import params, places
from tasks.endings import errors_as_text

OUT = Path("artifacts/models")
FAMILY = Path("artifacts/train_extended/model")
SOURCES = {"zero_shot": Path("artifacts/rank/model"), "short": Path("artifacts/train_short/model"), "extended": FAMILY}


@errors_as_text()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("budget", help="a budget's name in params.yaml")
    budget = parser.parse_args().budget
    settings = params.load()
    places.check(settings, "extract")
    section = settings.extract
    submodel = elastic_checkpoint.find_submodel(FAMILY, budget)
    for version, source in SOURCES.items():
        out = OUT / budget / version
        extract(source, submodel, out, section.heterogeneous, getattr(torch, section.dtype))
        print(f"{out}: {submodel}")
        if section.destination is not None:
            copy = storage.join(section.destination, budget, version)
            storage.upload_directory(out, copy)
            print(f"{out}: copied to {copy}")


if __name__ == "__main__":
    main()
