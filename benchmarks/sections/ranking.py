"""Iterative depth ranking against the naive loop: a full forward per candidate, iteration and batch."""

import itertools
import statistics
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from benchmarks.comparison import in_turn, median_ratio
from benchmarks.report import Row, at_most, holds, measured
from benchmarks.shapes import Shape, random_model
from elastic_core import ElasticModel, Submodel
from elastic_core.search.importance import depth as depth_ranking
from elastic_core.search.importance.depth import rank_layers

MOST = 0.45
# A layer's weight in the residual stream: the errors of a trained parent's layers lie this far apart and farther (the
# smoke profile's: 4 and more between neighbours in the ranking); those of random layers alone would be all alike.
LOUDEST, QUIETEST = 1.0, 0.15
REPEATS = 2


def rows(quick: bool) -> Iterator[Row]:
    shape = Shape("ranking", 32, "M-*M-", 64, 16, 4, head=16)
    if not quick:
        pattern = "".join(itertools.islice(itertools.cycle("M-M*-M-"), 14))
        shape = Shape("ranking", 64, pattern, 512, 64, 8, head=16)
    model = model_of_unequal_layers(shape)
    draw = torch.Generator().manual_seed(1)
    size = (shape.sequences, shape.length)
    batches = [torch.randint(0, shape.vocab, size, generator=draw) for _ in range(4)]
    with torch.no_grad():
        yield from against_naive(model, batches, quick)


def model_of_unequal_layers(shape: Shape) -> ElasticModel:
    """A random model whose layers matter unequally, in an order that is not theirs."""
    model = random_model(shape.config(), 0).eval()
    depth = len(model.model.layers)
    scales = torch.logspace(0, 1, depth).log10() * (LOUDEST - QUIETEST) + QUIETEST
    order = torch.randperm(depth, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for layer, scale in zip(model.model.layers, scales[order].tolist(), strict=True):
            for name, parameter in layer.named_parameters():
                if name.endswith(("out_proj.weight", "down_proj.weight", "o_proj.weight")):
                    parameter.mul_(scale)
    return model


def against_naive(model: ElasticModel, batches: list[Tensor], quick: bool) -> Iterator[Row]:
    depth = len(model.model.layers)
    what = f"{depth} layers, {len(batches)} batches of {'×'.join(map(str, batches[0].shape))} tokens"
    expected, naive_layers = count_layers(model, lambda: naive_ranking(model, batches))
    found, layers = count_layers(model, lambda: rank_layers(model, batches)[0])
    yield holds("ranking", f"{what}: the naive loop's", found == expected)
    note = f" ({layers:,} against {naive_layers:,}, per sequence)"
    yield bounded(quick, "ranking, layer applications", what, layers / naive_layers, note)
    with mock.patch.object(depth_ranking, "HELD_BYTES", 0):
        again, recomputed = count_layers(model, lambda: rank_layers(model, batches)[0])
    yield holds("ranking, nothing held", f"{what}: the naive loop's", again == expected)
    yield measured("ranking, nothing held, layer applications", what, f"{recomputed / naive_layers:.2f} ×")
    ways = {"ours": lambda: rank_layers(model, batches), "naive": lambda: naive_ranking(model, batches)}
    times = in_turn(ways, 1 if quick else REPEATS)
    note = f" ({statistics.median(times['ours']):.2f} s)"
    yield bounded(quick, "ranking, time", what, median_ratio(times, "ours", "naive"), note)


def bounded(quick: bool, check: str, what: str, ratio: float, note: str) -> Row:
    """The small shapes of a quick run have no goal: too few layers to save much."""
    return measured(check, what, f"{ratio:.2f} ×{note}") if quick else at_most(check, what, ratio, MOST, note)


def count_layers(model: ElasticModel, function: Callable[[], object]) -> tuple[object, int]:
    """What `function` returns, and how many layers it applied to how many sequences."""
    sizes: list[int] = []
    handles = [
        layer.register_forward_hook(lambda _, args, __: sizes.append(len(args[0]))) for layer in model.model.layers
    ]
    try:
        return function(), sum(sizes)
    finally:
        for handle in handles:
            handle.remove()


def naive_ranking(model: ElasticModel, batches: list[Tensor]) -> tuple[int, ...]:
    """Layers from the most to the least important by eq. 5 as it stands, from whole logits."""
    full = [model(input_ids) for input_ids in batches]
    kept, removed = list(range(len(model.model.layers))), []
    while len(kept) > 1:
        errors = {}
        for layer in kept:
            without = Submodel(kept_layers=tuple(other for other in kept if other != layer))
            errors[layer] = sum(
                (model(ids, without) - whole).square().sum().item() for ids, whole in zip(batches, full, strict=True)
            )
        removed.append(min(errors, key=errors.get))
        kept.remove(removed[-1])
    return tuple(kept + removed[::-1])
