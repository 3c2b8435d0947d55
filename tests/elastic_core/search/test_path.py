"""Submodels in between: every share is served, they are nested with the members, balanced, few, and found quickly."""

import itertools
import math
import random
import time
from dataclasses import replace

import pytest
import torch

from elastic_core.cost.budgets import TOLERANCE
from elastic_core.cost.memory import Memory
from elastic_core.cost.metrics import PARAMETERS, exact_cost, expected_cost, num_parameters
from elastic_core.model import architectures, hf
from elastic_core.model.axes import FIELDS, PER_LAYER
from elastic_core.model.dims import layer_of
from elastic_core.search import path as path_module
from elastic_core.search.choices import Choices
from elastic_core.search.path import MULTIPLES, path_between, staircase, widths_between
from elastic_core.search.space import ElasticSpace
from tasks.parents.config import new_config
from tasks.settings.load import read
from tests.support.committed_params import COMMITTED, ROOT
from tests.support.models.parents import random_config, random_llama_config, random_moe_config

SETTINGS = read(COMMITTED, "params.yaml")
ARCHITECTURES = {"nemotron_h": random_config, "moe": random_moe_config, "llama": random_llama_config}
CASES = [("nemotron_h", 0, ()), ("nemotron_h", 1, ()), ("nemotron_h", 2, PER_LAYER), ("nemotron_h", 3, PER_LAYER)]
CASES += [("nemotron_h", 4, ("mamba_num_heads",)), ("moe", 0, ()), ("moe", 1, ()), ("llama", 0, ()), ("llama", 1, ())]
CASES += [("llama", 2, ("intermediate_size",)), ("llama", 3, ("intermediate_size",)), ("llama", 4, ())]


def random_space(name: str, seed: int, heterogeneous=(), metric=PARAMETERS) -> ElasticSpace:
    """A random parent, three random sizes per axis and a random ranking of the layers."""
    rng, config = random.Random(seed), ARCHITECTURES[name](seed)
    units, sizes = architectures.units(config), {}
    for unit in units.values():
        smallest = max(unit.least, unit.groups, unit.size - 5 * unit.groups)
        allowed = range(unit.size, smallest - 1, -unit.groups)
        if name == "llama" and unit.key == "hidden":
            problem = architectures.of(config).size_problem
            allowed = [size for size in allowed if problem(config, size, config.num_attention_heads) is None]
        if name == "llama" and unit.key.startswith("attention_heads"):
            allowed = [unit.size]
        if name == "moe" and unit.key == "hidden" and unit.size % 8 == 0:
            allowed = [size for size in allowed if size % 8 == 0]
        if name == "moe" and unit.key.startswith("expert_ffn") and unit.size % 8 == 0:
            allowed = range(unit.size, 0, -8)
        few = rng.sample(allowed[1:], min(2, len(allowed) - 1))
        sizes.setdefault(FIELDS[unit.key.partition(".")[0]], tuple(sorted({unit.size, *few}, reverse=True)))
    layers = list(range(architectures.num_layers(config)))
    rng.shuffle(layers)
    if name != "llama":  # the last attention layer that is dropped
        layers.sort(key=lambda layer: architectures.pattern(config)[layer] != "*")
    depth = (len(layers), len(layers) - 1, max(1, len(layers) - 2))
    fields = {field: size for field, size in sizes.items() if field in Choices.__dataclass_fields__}
    return ElasticSpace(
        config, Choices(**fields, depth=tuple(dict.fromkeys(depth)), heterogeneous=heterogeneous), layers, metric=metric
    )


def random_family(space: ElasticSpace, seed: int) -> list[list[int]]:
    """The parent, the smallest combination, and one in between."""
    rng = random.Random(seed)
    smallest = [end - 1 for end in space.num_servable]
    return [[0] * len(smallest), [rng.randint(0, last) for last in smallest], smallest]


def default_space() -> ElasticSpace:
    config = new_config(SETTINGS.parent.model, SETTINGS.prepare_data.vocab_size, eos_token_id=0, pad_token_id=0)
    return ElasticSpace(config, SETTINGS.choices, (0, 1, 2, 5, 6, 7, 3, 4))


def large_space(heterogeneous=(), metric=PARAMETERS) -> ElasticSpace:
    """62 layers, with the choices of the profile of that parent."""
    config = hf.read_config(ROOT / "profiles/parents/NVIDIA-Nemotron-Nano-12B-v2")
    sizes = {
        "hidden_size": (5120, 4800, 4480, 4160, 3840, 3584),
        "intermediate_size": (20480, 17920, 15680, 13440, 11200, 8960),
        "mamba_num_heads": (128, 120, 112, 104, 96),
        "mamba_head_dim": (80, 72, 64),
        "num_attention_heads": (40, 32),
        "depth": (62, 58, 56, 54, 52, 50),
    }
    return ElasticSpace(config, Choices(**sizes, heterogeneous=heterogeneous), tuple(range(62)), metric=metric)


def by_axis(space: ElasticSpace, **sizes: int) -> list[int]:
    """The combination with these sizes, by field; other axes have the parent's."""
    fields = [FIELDS.get(slot.axis, slot.axis) for slot in space.slots]
    return [slot.sizes.index(sizes.get(field, slot.sizes[0])) for slot, field in zip(space.slots, fields, strict=True)]


def reachable_costs(space, larger, smaller) -> list[float]:
    """The costs of all combinations of the finest sizes between two members, with heads and channels on a staircase."""
    widths = widths_between(space, larger, smaller, MULTIPLES[-1])
    grids = torch.meshgrid(*[torch.arange(len(width.sizes)) for width in widths], indexing="ij")
    index = torch.stack([grid.flatten() for grid in grids], 1)
    assert len(index) < 2_000_000
    allowed = torch.ones(len(index), dtype=torch.bool)
    for (a, first), (b, second) in itertools.combinations(enumerate(widths), 2):
        if {first.axis, second.axis} == {"mamba_heads", "mamba_channels"}:
            allowed &= staircase(first, second)[index[:, a], index[:, b]]
        if (first.axis, second.axis) == ("hidden", "attention_heads") and space.config.model_type == "llama":
            hidden, heads = torch.tensor(first.sizes)[index[:, a]], torch.tensor(second.sizes)[index[:, b]]
            allowed &= hidden % heads == 0
    index = index[allowed]
    columns = [torch.tensor(width.sizes)[column].double() for width, column in zip(widths, index.T, strict=True)]
    sizes = {key: column for width, column in zip(widths, columns, strict=True) for key in width.keys}
    layers = [space.depth_ranking.index(layer) for layer in range(len(space.depth_ranking))]
    keep = torch.stack([(columns[-1] > place).double() for place in layers])
    return expected_cost(space.metric, space.config, sizes, keep).unique().tolist()


def nearest(costs: list[float], target: float) -> float:
    """How far the nearest cost is from a target, as a share of the target."""
    return min(abs(cost - target) / target for cost in costs)


def targets_between(high: float, low: float) -> list[float]:
    """Costs in steps of half a percent."""
    return [high * 0.995**step for step in range(math.ceil(math.log(high / low) / -math.log(0.995)))]


@pytest.mark.parametrize("metric", [PARAMETERS, Memory(64, batch=4)], ids=lambda metric: metric.name)
@pytest.mark.parametrize(("name", "seed", "heterogeneous"), CASES)
def test_every_share_is_served_where_any_combination_reaches_it(name, seed, heterogeneous, metric):
    space = random_space(name, seed, heterogeneous, metric)
    family = random_family(space, seed)
    path = path_between(space, family)
    served = [exact_cost(metric, space.config, submodel) for submodel in path]
    served += [space.exact_cost(indices) for indices in family]
    for larger, smaller in itertools.pairwise(family):
        reachable = reachable_costs(space, larger, smaller)
        for target in targets_between(space.exact_cost(larger), space.exact_cost(smaller)):
            assert nearest(served, target) <= TOLERANCE or nearest(reachable, target) > TOLERANCE


@pytest.mark.parametrize(("name", "seed", "heterogeneous"), CASES)
def test_each_is_nested_with_the_members_and_has_allowed_sizes(name, seed, heterogeneous):
    space = random_space(name, seed, heterogeneous)
    config, family = space.config, random_family(space, seed)
    full = space.submodel(family[0])
    for larger, smaller in itertools.pairwise(family):
        path = path_between(space, [larger, smaller])
        outer, inner = space.submodel(larger), space.submodel(smaller)
        costs = [exact_cost(PARAMETERS, config, submodel) for submodel in path]
        assert costs == sorted(costs, reverse=True) and len(set(path)) == len(path)
        for submodel in path:
            assert inner.is_within(submodel, config) and submodel.is_within(outer, config)
            assert submodel not in (inner, outer) and submodel.is_within(full, config)
            assert submodel.kept_layers == tuple(sorted(space.depth_ranking[: len(submodel.kept_layers)]))
            heads, hidden = submodel.num_attention_heads, submodel.hidden_size
            assert name != "llama" or architectures.of(config).size_problem(config, hidden, heads) is None
    assert path_between(space, family) == path_between(space, family)


def test_heads_and_channels_of_a_layer_only_shrink_together():
    """On the whole path, one pair of sizes is always within the other, so that rows can be stored in one order."""
    for seed in range(6):
        space = random_space("nemotron_h", seed, ("mamba_num_heads",) if seed % 2 else ())
        family = random_family(space, seed)
        submodels = [*path_between(space, family), *map(space.submodel, family)]
        for layer in (i for i, kind in enumerate(architectures.pattern(space.config)) if kind == "M"):
            kept = [s.sizes(space.config) for s in submodels if layer in s.kept_layers]
            pairs = sorted({(s[f"mamba_heads.{layer}"], s[f"mamba_channels.{layer}"]) for s in kept})
            assert all(before[1] <= after[1] for before, after in itertools.pairwise(pairs))


def test_all_shares_of_the_default_family_are_served():
    space = default_space()
    family = [
        by_axis(space),
        by_axis(space, hidden_size=120, intermediate_size=320, depth=6),
        by_axis(space, hidden_size=88, intermediate_size=192, depth=6),
    ]
    start = time.process_time()
    path = path_between(space, family)
    assert time.process_time() - start < 1
    costs = [exact_cost(PARAMETERS, space.config, submodel) for submodel in path] + [space.exact_cost(family[-1])]
    full = space.exact_cost(family[0])
    for share in [0.43 + 0.005 * step for step in range(114)] + [0.55, 0.75]:
        assert nearest([full, *costs], share * full) <= TOLERANCE, share
    ordered = sorted([full, *costs])
    assert max(after / before for before, after in itertools.pairwise(ordered)) < 1.0201  # bins of one percent
    assert all(submodel.intermediate_size % 8 == 0 and submodel.hidden_size % 8 == 0 for submodel in path)


def test_all_axes_shrink_together():
    """Half-way between two members, no axis with several sizes is near one of its ends."""
    space = default_space()
    high, low = by_axis(space), [end - 1 for end in space.num_servable]
    middle = math.sqrt(space.exact_cost(high) * space.exact_cost(low))
    found = [s for s in path_between(space, [high, low]) if abs(num_parameters(space.config, s) / middle - 1) < 0.02]
    assert found
    for submodel in found:
        assert len(submodel.kept_layers) == 7
        assert 80 <= submodel.hidden_size <= 104 and 200 <= submodel.intermediate_size <= 330
        assert submodel.mamba_num_heads == 6 and 16 <= submodel.mamba_head_dim <= 20


@pytest.mark.parametrize("heterogeneous", [(), PER_LAYER], ids=["homogeneous", "heterogeneous"])
def test_with_many_combinations_those_near_the_line_serve_all_shares_too(heterogeneous, monkeypatch):
    monkeypatch.setattr(path_module, "MOST_CANDIDATES", 2_000)
    space = ElasticSpace(default_space().config, replace(SETTINGS.choices, heterogeneous=heterogeneous), range(8))
    for seed in (1, 3, 4, 5):  # whose members are not so near to each other that no size lies in between
        family = random_family(space, seed)
        costs = [num_parameters(space.config, submodel) for submodel in path_between(space, family)]
        costs += map(space.exact_cost, family)
        for larger, smaller in itertools.pairwise(map(space.exact_cost, family)):
            assert all(nearest(costs, target) <= TOLERANCE for target in targets_between(larger, smaller))


@pytest.mark.parametrize("metric", [PARAMETERS, Memory(131072, batch=8)], ids=lambda metric: metric.name)
@pytest.mark.parametrize("heterogeneous", [(), PER_LAYER], ids=["homogeneous", "heterogeneous"])
def test_the_path_of_a_large_parent_is_found_quickly_and_is_short(heterogeneous, metric):
    space = large_space(heterogeneous, metric)
    family = random_family(space, 0)
    start = time.process_time()
    path = path_between(space, family)
    assert time.process_time() - start < 5
    assert len(path) <= 2 * path_module.MOST_BINS
    costs = [exact_cost(metric, space.config, submodel) for submodel in path] + list(map(space.exact_cost, family))
    for larger, smaller in itertools.pairwise(family):
        targets = targets_between(space.exact_cost(larger), space.exact_cost(smaller))
        assert all(nearest(costs, target) <= TOLERANCE for target in targets)
    for submodel in path:
        for size in {submodel.hidden_size, *submodel.sizes(space.config).values()} - {40, 32, submodel.mamba_head_dim}:
            assert size % 8 == 0


def test_a_uniform_axis_stays_uniform():
    """Widths may differ between layers, but the members' do not; the layers that the smaller drops do not count."""
    space = large_space(PER_LAYER)
    smaller = by_axis(space, intermediate_size=15680, mamba_num_heads=112, hidden_size=4480, depth=56)
    dropped = set(space.depth_ranking[56:])
    for number, slot in enumerate(space.slots):
        if layer_of(slot.keys[0]) in dropped:
            smaller[number] = 0
    path = path_between(space, [by_axis(space), smaller])
    assert path and all(submodel.is_homogeneous for submodel in path)


def test_widths_that_differ_shrink_layer_by_layer():
    space = large_space(("intermediate_size",))
    smaller = by_axis(space, hidden_size=4480)
    slots = [number for number, slot in enumerate(space.slots) if slot.axis == "ffn"]
    for number in slots:
        smaller[number] = number % 6
    path = path_between(space, [by_axis(space), smaller])
    ends = [space.slots[number].sizes[smaller[number]] for number in slots]
    middle = path[len(path) // 2].intermediate_size
    assert isinstance(middle, tuple) and len(middle) == len(slots)
    for size, end in zip(middle, ends, strict=True):
        position = 0.5 if end == 20480 else math.log(20480 / size) / math.log(20480 / end)
        assert 0.3 < position < 0.7


def test_members_of_equal_cost_have_nothing_in_between():
    space = default_space()
    assert path_between(space, [by_axis(space)]) == path_between(space, [by_axis(space), by_axis(space)]) == []
