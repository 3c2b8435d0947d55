"""Held-out bits per byte of slices of a sorted model, without training, for sizes that are given.

`python -m benchmarks.slices DIR SIZES …` for the workspace of a finished `rank` stage. SIZES are the hidden size, the
FFN width and the number of layers, such as 576,1024,30; the layers are the most important ones. The text is that of the
evaluate stage.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from benchmarks.held_out import held_out_loss
from elastic_core import ElasticModel, Submodel
from elastic_core.cost.metrics import num_parameters
from elastic_core.data.loader import TokenData
from elastic_core.search.importance.ranking import Ranking
from tasks.settings.load import FILE, load

HEADINGS = ("hidden", "FFN", "layers", "parameters", "bits per byte")
Sizes = tuple[int, int, int]


def read_sizes(text: str) -> Sizes:
    """The sizes in HIDDEN,FFN,LAYERS. Raises ValueError for another text."""
    hidden, ffn, layers = map(int, text.split(","))
    return hidden, ffn, layers


def lines(workspace: Path, sizes: list[Sizes]) -> Iterator[tuple[str, ...]]:
    """A line of the table for every slice. Raises UserError for sizes that the model does not have."""
    section, data = load(workspace / FILE).evaluate, TokenData(workspace / "artifacts/data")
    model = ElasticModel.from_pretrained(workspace / "artifacts/rank/model").eval()
    order = Ranking.load(workspace / "artifacts/rank/ranking.json").depth
    for hidden, ffn, layers in sizes:
        submodel = Submodel(hidden_size=hidden, intermediate_size=ffn, kept_layers=sorted(order[:layers]))
        nats, _, num_bytes = held_out_loss(model, submodel, data, section)
        count = num_parameters(model.config, submodel)
        yield f"{hidden}", f"{ffn:,}", f"{layers}", f"{count:,}", f"{nats / math.log(2) / num_bytes:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a workspace with artifacts/data and artifacts/rank")
    parser.add_argument("sizes", nargs="+", type=read_sizes, metavar="SIZES", help="hidden,FFN,layers")
    given = parser.parse_args()
    for line in (HEADINGS, ["---"] * len(HEADINGS)):
        print("| " + " | ".join(line) + " |")
    for line in lines(given.directory, given.sizes):
        print("| " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
    main()
