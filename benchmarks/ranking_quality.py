"""What a ranking is worth: held-out bits per byte of zero-shot slices, chosen by it and by the alternatives.

`python -m benchmarks.ranking_quality DIR …` for workspaces of finished `prepare_data` and `parent` stages (.runs/smoke,
or . for the default run). `--parts` says what to compare:
widths   all widths reduced in proportion to every budget, all layers kept: importance (eqs. 1–4, and by output norm)
         against the magnitude of the weights and chance
axes     one width at a time, to the size it has at the smallest budget
distil   `widths` after `--steps` steps of distillation, each slice alone, all in the same order of the data
depth    iterative nMSE (eq. 5) against one-shot nMSE and perplexity, all widths kept
The first lines are the parent, and guessing by how often a token comes: a slice that is no better knows nothing.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.held_out import held_out_loss
from elastic_core import ElasticModel, Submodel, rank, sort_
from elastic_core.cost.metrics import exact_cost, num_parameters
from elastic_core.data.loader import IGNORED_LABEL, PackedSequences, TokenData, held_out_batches
from elastic_core.model.axes import WIDTHS
from elastic_core.model.dims import Layout, elastic_units
from elastic_core.search.importance.depth import METHODS, rank_layers
from elastic_core.search.importance.ranking import Ranking
from elastic_core.search.importance.widths import order_units
from elastic_core.search.selection import Member
from elastic_core.search.space import ElasticSpace
from elastic_core.training.loop import train
from elastic_core.training.run import Run
from tasks.parents.targets import metric_of_family, resolve
from tasks.settings.load import FILE, load
from tasks.settings.sections import Evaluate, Rank

HEADINGS = ("model", "budget", "reduced", "ranking", "share", "bits per byte")
PARTS = ("widths", "axes", "distil", "depth")
IMPORTANCES = (("projection", "l1"), ("output_norm", "l2"))  # the paper's, and what proved better here
Line = tuple[str, str, str, str, str, str]


def lines(workspace: Path, parts: Collection[str], steps: int, seeds: int) -> Iterator[Line]:
    """The table's lines for one workspace."""
    bench = Bench(workspace, seeds)
    yield bench.line("–", "none", "–", bench.model.full, [bench.score(bench.model, bench.model.full)])
    yield bench.name, "–", "token frequencies", "–", "–", f"{unigram(bench.data, bench.settings.evaluate):.4f}"
    targets = {budget: target for budget, target in resolve(bench.settings, bench.model.config).items() if target < 1}
    if not targets:
        return
    shapes = {budget: proportional_widths(bench.space, target) for budget, target in targets.items()}
    if "widths" in parts:
        yield from compared(bench, {(budget, "widths"): shape for budget, shape in shapes.items()}, bench.score)
    if "axes" in parts:
        smallest = min(targets, key=targets.get)
        slices = one_by_one(bench.model, shapes[smallest])
        yield from compared(bench, {(smallest, name): submodel for name, submodel in slices.items()}, bench.score)
    if "distil" in parts:
        slices = {(budget, f"widths, {steps} steps"): shape for budget, shape in shapes.items()}
        yield from compared(bench, slices, functools.partial(bench.distilled_score, steps=steps))
    if "depth" in parts:
        yield from depth_lines(bench, targets)


class Bench:
    """A workspace's parent, its data, and the calibration batches of its `rank` stage."""

    def __init__(self, workspace: Path, seeds: int):
        self.settings, self.name = load(workspace / FILE), workspace.resolve().name
        self.seeds = seeds
        self.data, section = TokenData(workspace / "artifacts/data"), self.settings.rank
        self.model = ElasticModel.from_pretrained(workspace / "artifacts/parent").eval()
        sequences = PackedSequences(self.data, section.mixture, section.sequence_length, self.settings.seed + 1)
        self.batches = [sequences.batch(i * section.batch_size, section.batch_size) for i in range(section.batches)]
        order = tuple(range(len(self.model.model.layers)))
        metric = metric_of_family(self.settings)
        self.space = ElasticSpace(self.model.config, self.settings.choices, order, metric=metric)

    def line(self, budget: str, reduced: str, ranking: str, submodel: Submodel, scores: list[float]) -> Line:
        share = num_parameters(self.model.config, submodel) / num_parameters(self.model.config)
        spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
        return self.name, budget, reduced, ranking, f"{share:.3f}", f"{statistics.mean(scores):.4f}{spread}"

    def score(self, ranked: ElasticModel, submodel: Submodel) -> float:
        """Bits per byte of the held-out text that the evaluate stage reads too."""
        nats, _, num_bytes = held_out_loss(ranked, submodel, self.data, self.settings.evaluate)
        return nats / math.log(2) / num_bytes

    def distilled_score(self, ranked: ElasticModel, submodel: Submodel, steps: int) -> float:
        """The same after the slice alone has learned from the parent for `steps` steps, as stage 1 sets them."""
        stage = dataclasses.replace(
            self.settings.train_short,
            steps=steps,
            warmup_steps=steps // 10,
            microbatches=1,
            budget_shares={},
            loss_by_budget={},
        )
        data = PackedSequences(self.data, stage.mixture, stage.sequence_length, self.settings.seed + 2)
        model = copy.deepcopy(ranked)
        target = num_parameters(model.config, submodel) / num_parameters(model.config)
        member = {"slice": Member(target, submodel)}
        run = Run(model, stage, data, {"slice": target}, member, teacher=copy.deepcopy(self.model))
        for _ in train(run):
            pass
        return self.score(model.eval(), submodel)


def compared(
    bench: Bench, slices: dict[tuple[str, str], Submodel], score: Callable[[ElasticModel, Submodel], float]
) -> Iterator[Line]:
    """A line per slice and ranking of its units. A slice is named by its budget and by what is smaller in it."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for ranking, orders in width_orders(bench.model, bench.batches, bench.settings.rank, bench.seeds):
        ranked = sort_(copy.deepcopy(bench.model), Ranking({}, orders, ()))
        for name, submodel in slices.items():
            found.setdefault((*name, ranking), []).append(score(ranked, submodel))
    for (*name, ranking), scores in sorted(found.items(), key=lambda item: list(slices).index(item[0][:2])):
        yield bench.line(*name, ranking, slices[tuple(name)], scores)


def one_by_one(model: ElasticModel, shape: Submodel) -> dict[str, Submodel]:
    """The whole model with one width as in `shape`, for every width that is smaller there."""
    widths = {name: (getattr(shape, name), getattr(model.full, name)) for name in WIDTHS}
    return {f"{name} {size}/{full}": Submodel(**{name: size}) for name, (size, full) in widths.items() if size != full}


def depth_lines(bench: Bench, targets: dict[str, float]) -> Iterator[Line]:
    """Every budget's number of layers, kept by every method; which are left out is said with the method."""
    depths = {budget: depth_for(bench.space, target) for budget, target in targets.items()}
    batches = bench.batches[: bench.settings.rank.depth_batches]
    orders = depth_orders(bench.model, batches, min(depths.values()))
    for (budget, depth), (method, order) in itertools.product(depths.items(), orders.items()):
        submodel = Submodel(kept_layers=order[:depth])
        name = f"{method}, without {' '.join(map(str, sorted(order[depth:])))}"
        yield bench.line(budget, f"depth {depth}/{len(order)}", name, submodel, [bench.score(bench.model, submodel)])


def unigram(data: TokenData, section: Evaluate) -> float:
    """Bits per byte of the held-out text by the frequencies of tokens in each source's training text."""
    nats = num_bytes = 0.0
    for source in section.held_out:
        size = data.manifest.vocab_size
        counts = np.bincount(data.tokens(source, "train"), minlength=size) + 1
        loss = torch.from_numpy(-np.log(counts / counts.sum()))
        for _, labels, _ in held_out_batches(
            data, source, section.sequence_length, section.batch_size, section.max_tokens
        ):
            live = labels[labels != IGNORED_LABEL]
            nats += loss[live].sum().item()
            num_bytes += len(live) * data.bytes_per_token(source, "held_out")
    return nats / math.log(2) / num_bytes


def width_orders(
    model: ElasticModel, batches: list[Tensor], section: Rank, seeds: int
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Orders of all widths by importance, by the weights' magnitude and by chance, with the ranking's name."""
    units = elastic_units(model.layout)
    for measure, aggregation in dict.fromkeys([*IMPORTANCES, (section.measure, section.aggregation)]):
        options = {"measure": measure, "aggregation": aggregation, "basis": "channels", "private_norms": False}
        ranking = rank(model, batches, **options, depth_method="one_shot_nmse", depth_batches=1)
        yield f"importance ({measure}, {aggregation})", ranking.orders
    magnitudes = weight_magnitudes(dict(model.named_parameters()), model.layout)
    yield "weight magnitude", {key: order_units(units[key], score) for key, score in magnitudes.items()}
    for seed in range(seeds):
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


def proportional_widths(space: ElasticSpace, target: float) -> Submodel:
    """All layers, and of the choices within 2 % of a budget those that keep the most equal share of every width."""
    full = space.exact_cost([0] * len(space.slots))
    slots = space.axis_slots()
    shares = (space.grid_costs(slots) / full / target - 1).abs()[..., 0]  # every depth but the parent's is left out
    near = (shares <= max(0.02, shares.min().item())).nonzero().tolist()

    def inequality(indices: list[int]) -> float:
        pairs = zip(slots[:-1], indices, strict=True)
        kept = [slot.sizes[i] / slot.sizes[0] for slot, i in pairs if len(slot.sizes) > 1]
        return statistics.pstdev(kept) if kept else 0.0

    best = dict(zip((slot.axis for slot in slots), [*min(near, key=inequality), 0], strict=True))
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
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["widths", "depth"], help="what to compare")
    parser.add_argument("--steps", type=int, default=100, help="of distillation")
    parser.add_argument("--seeds", type=int, default=8, help="of the random ranking")
    given = parser.parse_args()
    found = (lines(directory, given.parts, given.steps, given.seeds) for directory in given.directory)
    print(table(list(itertools.chain.from_iterable(found))))


if __name__ == "__main__":
    main()
