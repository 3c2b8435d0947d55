"""What a ranking is worth: held-out bits per byte of zero-shot slices, cut by it and by the alternatives.

`python -m benchmarks.ranking_quality DIR …` for workspaces of finished `prepare_data` and `parent` stages (.runs/smoke,
or . for the default run). Widths: importance (eqs. 1–4) against the magnitude of the weights and chance, every ranking
cut to the same sizes, all layers kept. Depth: iterative nMSE (eq. 5) against one-shot nMSE and perplexity, all widths
kept. Nothing is trained.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.held_out import held_out_loss
from elastic_core import ElasticModel, Submodel, rank, sort_
from elastic_core.choices import ElasticSpace
from elastic_core.cost import exact_cost, num_parameters
from elastic_core.data import PackedSequences, TokenData
from elastic_core.depth_ranking import METHODS, rank_layers
from elastic_core.importance import Ranking, order_units
from elastic_core.layout import Layout, elastic_units
from tasks import params
from tasks.targets import resolve

HEADINGS = ("model", "budget", "cut", "ranking", "share", "bits per byte")
SEEDS = 3  # of the random ranking
Line = tuple[str, str, str, str, str, str]


def lines(workspace: Path) -> Iterator[Line]:
    """The table's lines for one workspace."""
    settings = params.load(workspace / params.FILE)
    data, section = TokenData(workspace / "artifacts/data"), settings.rank
    model = ElasticModel.from_pretrained(workspace / "artifacts/parent").eval()
    sequences = PackedSequences(data, section.mixture, section.sequence_length, settings.seed + 1)
    batches = [sequences.batch(i * section.batch_size, section.batch_size)[0] for i in range(section.batches)]
    order = tuple(range(len(model.model.layers)))
    space = ElasticSpace(model.config, settings.choices, order, metric=settings.metric)
    held_out, name = settings.evaluate, workspace.resolve().name

    def line(budget: str, cut: str, ranking: str, submodel: Submodel, scores: list[float]) -> Line:
        share = num_parameters(model.config, submodel) / num_parameters(model.config)
        spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
        return name, budget, cut, ranking, f"{share:.3f}", f"{statistics.mean(scores):.4f}{spread}"

    def score(ranked: ElasticModel, submodel: Submodel) -> float:
        return bits_per_byte(ranked, submodel, data, held_out)

    yield line("–", "none", "–", model.full, [score(model, model.full)])
    targets = {budget: target for budget, target in resolve(settings, model.config).items() if target < 1}
    if not targets:
        return
    found: dict[tuple[str, str], list[float]] = {}
    shapes = {budget: even_widths(space, target) for budget, target in targets.items()}
    for ranking, orders in width_orders(model, batches, section.aggregation):
        ranked = sort_(copy.deepcopy(model), Ranking({}, orders, ()))
        for budget, shape in shapes.items():
            found.setdefault((budget, ranking), []).append(score(ranked, shape))
    for (budget, ranking), scores in sorted(found.items(), key=lambda item: list(targets).index(item[0][0])):
        yield line(budget, "widths", ranking, shapes[budget], scores)
    depths = {budget: depth_for(space, target) for budget, target in targets.items()}
    orders = depth_orders(model, batches[: section.depth_batches], min(depths.values()))
    for (budget, depth), (method, order) in itertools.product(depths.items(), orders.items()):
        submodel = Submodel(kept_layers=order[:depth])
        yield line(budget, f"depth {depth}/{len(order)}", method, submodel, [score(model, submodel)])


def bits_per_byte(model: ElasticModel, submodel: Submodel, data: TokenData, section: params.Evaluate) -> float:
    """Of the held-out text that the evaluate stage reads too."""
    nats, _, num_bytes = held_out_loss(model, submodel, data, section)
    return nats / math.log(2) / num_bytes


def width_orders(
    model: ElasticModel, batches: list[Tensor], aggregation: str
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Orders of all widths by importance, by the weights' magnitude and by chance, with the ranking's name."""
    units = elastic_units(model.layout)
    yield "importance", rank(model, batches, aggregation, "one_shot_nmse", depth_batches=1).orders
    magnitudes = weight_magnitudes(dict(model.named_parameters()), model.layout)
    yield "weight magnitude", {key: order_units(units[key], score) for key, score in magnitudes.items()}
    for seed in range(SEEDS):
        draw = torch.Generator().manual_seed(seed)
        yield "random", {key: order_units(unit, torch.rand(unit.size, generator=draw)) for key, unit in units.items()}


@torch.no_grad()
def weight_magnitudes(parameters: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """‖all weights of a unit‖₂, float64, per unit key; rows that a dimension gives to every unit count for each."""
    squares = {key: torch.zeros(unit.size, dtype=torch.float64) for key, unit in elastic_units(layout).items()}
    for name, dims in layout.items():
        for axis, dim in enumerate(dims):
            others = [other for other in range(len(dims)) if other != axis]
            rows = parameters[name].double().square()
            rows = rows.sum(others) if others else rows
            for leaf in dim.leaves():
                picks = [dim.rows({leaf.key: torch.tensor([unit])}) for unit in range(leaf.size)]
                squares[leaf.key] += rows[torch.stack(picks)].sum(1)
    return {key: value.sqrt() for key, value in squares.items()}


def even_widths(space: ElasticSpace, target: float) -> Submodel:
    """All layers, and the widths among the choices that are within 2 % of a budget and cut all axes most alike."""
    full = space.exact_cost([0] * len(space.slots))
    slots = space.axis_slots()
    shares = (space.grid_costs(slots) / full / target - 1).abs()[..., 0]  # every depth but the parent's is left out
    near = (shares <= max(0.02, shares.min().item())).nonzero().tolist()

    def unevenness(indices: list[int]) -> float:
        pairs = zip(slots[:-1], indices, strict=True)
        kept = [slot.sizes[i] / slot.sizes[0] for slot, i in pairs if len(slot.sizes) > 1]
        return statistics.pstdev(kept) if kept else 0.0

    best = dict(zip((slot.axis for slot in slots), [*min(near, key=unevenness), 0], strict=True))
    return space.submodel([best[slot.axis] for slot in space.slots])


def depth_for(space: ElasticSpace, target: float) -> int:
    """The number of layers with which a model of average layers is nearest to a budget."""
    cost, num_layers = functools.partial(exact_cost, space.metric, space.config), len(space.depth_ranking)
    full = cost()
    alone = [full - cost(Submodel(kept_layers=_without(i, num_layers))) for i in range(num_layers)]
    wanted = num_layers - (1 - target) * full / statistics.mean(alone)
    return min(max(1, round(wanted)), num_layers - 1)


def _without(layer: int, num_layers: int) -> list[int]:
    return [i for i in range(num_layers) if i != layer]


def depth_orders(model: ElasticModel, batches: list[Tensor], min_depth: int) -> dict[str, tuple[int, ...]]:
    """The layers from the most to the least important, by every method."""
    with torch.no_grad():
        return {method: rank_layers(model, batches, method, min_depth)[0] for method in METHODS}


def table(found: list[Line]) -> str:
    """Markdown."""
    rows = [HEADINGS, tuple("---" for _ in HEADINGS), *found]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="+", type=Path, help="a workspace with artifacts/data and artifacts/parent")
    print(table([line for directory in parser.parse_args().directory for line in lines(directory)]))


if __name__ == "__main__":
    main()
