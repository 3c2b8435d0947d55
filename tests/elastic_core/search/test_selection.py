"""From distributions to submodels: the best combination within budget, or an error that says what to change."""

import itertools

import pytest
import torch
from transformers import NemotronHConfig

from elastic_core.config import ConfigError
from elastic_core.cost.memory import Memory
from elastic_core.cost.metrics import PARAMETERS, exact_cost, num_parameters
from elastic_core.search import selection
from elastic_core.search.choices import Choices
from elastic_core.search.selection import LARGEST_GRID, check_reachable, propose, select, select_family
from elastic_core.search.space import ElasticSpace
from tests.support.models.routed_family import CONFIG, PER_LAYER, RANKING, SIZES, make_router, make_space

FULL = num_parameters(CONFIG)
LARGE = NemotronHConfig(**CONFIG.to_dict() | {"layers_block_type": NemotronHConfig._pattern_to_list("M-*-M-M-")})


LUMPY = NemotronHConfig(**CONFIG.to_dict() | {"layers_block_type": NemotronHConfig._pattern_to_list("M-*-M-*-")})


def random_log_probs(space, seed):
    generator = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(len(slot.sizes), generator=generator)).log_softmax(-1) for slot in space.slots]


def large_space():
    """More combinations than are looked at one by one."""
    sizes = {**SIZES, "intermediate_size": (24, 20, 16, 12, 8), "depth": (8, 7, 6)}
    space = ElasticSpace(LARGE, Choices(**sizes, heterogeneous=PER_LAYER), (0, 2, 1, 4, 3, 6, 5, 7))
    assert torch.tensor([len(slot.sizes) for slot in space.slots]).prod() > LARGEST_GRID
    return space


@pytest.fixture(scope="module")
def costs():
    """Every combination of the two small spaces and its size, counted one by one."""
    table = {}
    for heterogeneous in [(), ("intermediate_size", "mamba_num_heads")]:
        space = make_space(heterogeneous)
        combinations = itertools.product(*(range(len(slot.sizes)) for slot in space.slots))
        counts = {c: num_parameters(CONFIG, space.submodel(list(c))) for c in combinations}
        table[heterogeneous] = space, counts
    return table


@pytest.mark.parametrize("heterogeneous", [(), ("intermediate_size", "mamba_num_heads")])
@pytest.mark.parametrize("seed", range(3))
def test_select_is_the_best_of_all_combinations(costs, heterogeneous, seed):
    space, counts = costs[heterogeneous]
    log_probs = random_log_probs(space, seed)
    for target, tolerance, nested in itertools.product([0.8 * FULL, 0.45 * FULL], [0.02, 0.002], [False, True]):
        bound = [int(nested and slot.axis in ("hidden", "ffn", "depth")) for slot in space.slots]

        def score(indices, target=target):
            likelihood = sum(float(z[i]) for z, i in zip(log_probs, indices, strict=True))
            return likelihood - 1e-3 * abs(counts[indices] / target - 1)

        allowed = [
            indices
            for indices, count in counts.items()
            if abs(count / target - 1) <= tolerance and all(i >= low for i, low in zip(indices, bound, strict=True))
        ]
        found = select(space, log_probs, target, bound, tolerance)
        assert found == (list(max(allowed, key=score)) if allowed else None)


def test_select_finds_nothing_where_there_is_nothing():
    space = make_space()
    log_probs = random_log_probs(space, 0)
    start = [0] * len(space.slots)
    assert select(space, log_probs, 0.05 * FULL, start, 0.02) is None  # below the smallest
    smallest = [len(slot.sizes) - 1 for slot in space.slots]
    assert select(space, log_probs, 0.9 * FULL, smallest, 0.02) is None  # nested in the smallest
    assert select(space, log_probs, FULL * 1.0, start, 0.0) == start


def test_of_equally_probable_combinations_the_nearest_is_taken(costs):
    space, counts = costs[()]
    uniform = [torch.zeros(len(slot.sizes)) for slot in space.slots]
    for target in (0.8 * FULL, 0.5 * FULL):
        found = select(space, uniform, target, [0] * len(space.slots), 0.02)
        assert abs(counts[tuple(found)] - target) == min(abs(count - target) for count in counts.values())


def test_select_in_a_large_space_reaches_the_tolerance():
    space = large_space()
    full = num_parameters(LARGE)
    for seed in range(9):
        log_probs, bound = random_log_probs(space, seed), [0] * len(space.slots)
        for target in (0.8, 0.6, 0.4):
            found = select(space, log_probs, target * full, bound, 0.02)
            assert found is not None, (seed, target)
            assert abs(num_parameters(LARGE, space.submodel(found)) / (target * full) - 1) <= 0.02
            assert all(index >= low for index, low in zip(found, bound, strict=True))
            bound = found
    assert select(space, log_probs, 0.05 * full, [0] * len(space.slots), 0.02) is None


def test_select_in_a_large_space_keeps_what_is_within_budget_and_moves_what_is_least_certain():
    space = large_space()
    chosen = [min(1, len(slot.sizes) - 1) for slot in space.slots]
    certain = [10.0 * torch.eye(len(slot.sizes))[i] for slot, i in zip(space.slots, chosen, strict=True)]
    count = space.exact_cost(chosen)
    start = [0] * len(space.slots)
    assert select(space, certain, count, start, 0.01) == chosen
    certain[3] = torch.zeros(len(space.slots[3].sizes))  # one layer's MLP does not care
    certain[3][0] = 1e-3
    assert select(space, certain, count, start, 1e-3) == chosen


@pytest.mark.parametrize(
    "metric", [PARAMETERS, Memory(400, chunk=1), Memory(64, chunk=64)], ids=["count", "cache", "max"]
)
def test_the_search_in_a_large_space_is_exact_but_for_rounding(metric, monkeypatch):
    """Against all combinations of a space that is small enough to compare them."""
    space = ElasticSpace(CONFIG, Choices(**SIZES, heterogeneous=PER_LAYER), RANKING, metric=metric)
    start, full = [0] * len(space.slots), exact_cost(metric, CONFIG)
    for seed, target in itertools.product(range(3), (0.85, 0.6)):
        log_probs = random_log_probs(space, seed)
        best = select(space, log_probs, target * full, start, 0.0195)
        with monkeypatch.context() as patch:
            patch.setattr(selection, "LARGEST_GRID", 1)
            found = select(space, log_probs, target * full, start, 0.02)
        assert (found is None) == (best is None)
        if best is not None:
            scores = [sum(float(z[i]) for z, i in zip(log_probs, c, strict=True)) for c in (found, best)]
            assert scores[0] >= scores[1] - (1e-3 if metric != Memory(64, chunk=64) else 1.0), (seed, target)
            assert abs(space.exact_cost(found) / (target * full) - 1) <= 0.02


@pytest.mark.parametrize(
    "metric", [PARAMETERS, Memory(400, chunk=1), Memory(64, chunk=64)], ids=["count", "cache", "max"]
)
def test_every_router_gets_a_family_where_there_is_one(metric):
    """With several axes per layer, whatever the router believes: nested, and within the budgets."""
    sizes = {**SIZES, "intermediate_size": (24, 20, 16, 12, 8), "depth": (8, 7, 6)}
    targets = (1.0, 0.7, 0.5, 0.4)
    space = ElasticSpace(LUMPY, Choices(**sizes, heterogeneous=PER_LAYER), (0, 1, 4, 6, 3, 5, 7, 2), metric=metric)
    full = exact_cost(metric, LUMPY)
    check_reachable(space, {str(target): target for target in targets})
    for seed in range(6):
        family = select_family(make_router(space, seed, targets, spread=(1, 3, 20)[seed % 3]), scale=10.0)
        for target, indices in zip(targets, family, strict=True):
            assert abs(exact_cost(metric, LUMPY, space.submodel(indices)) / (target * full) - 1) <= 0.02
        for larger, smaller in itertools.pairwise(family):
            assert space.submodel(smaller).is_within(space.submodel(larger), LUMPY)


@pytest.mark.parametrize("heterogeneous", [(), PER_LAYER])
def test_proposals_are_the_most_probable_and_others_from_everywhere(heterogeneous):
    space = make_space(heterogeneous)
    log_probs, bound = random_log_probs(space, 1), [0] * len(space.slots)
    everything = propose(space, log_probs, 0.6 * FULL, bound, 10**6)
    assert all(abs(space.exact_cost(c) / (0.6 * FULL) - 1) <= 0.02 for c in everything)
    assert everything[0] == select(space, log_probs, 0.6 * FULL, bound, 0.02)
    few = propose(space, log_probs, 0.6 * FULL, bound, 9)
    assert len(few) == 9 and all(combination in everything for combination in few)
    assert everything[:4] == few[:4] or set(map(tuple, everything[:5])) <= set(map(tuple, few))
    ranks = [everything.index(combination) for combination in few]
    assert ranks == sorted(ranks) and ranks[-1] > len(everything) / 3  # not only what the router prefers


def test_costs_of_many_combinations_are_those_of_each():
    space = large_space()
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randint(len(slot.sizes), (20,), generator=generator) for slot in space.slots], dim=1)
    assert space.costs(rows).tolist() == [num_parameters(LARGE, space.submodel(row.tolist())) for row in rows]


def test_grid_costs_are_those_of_each_combination(costs):
    for space, counts in costs.values():
        grid = space.grid_costs(space.slots)
        assert grid.numel() == len(counts)
        assert all(grid[indices] == count for indices, count in list(counts.items())[::7])


@pytest.mark.parametrize("heterogeneous", [(), PER_LAYER])
def test_check_reachable(heterogeneous):
    space = make_space(heterogeneous)
    check_reachable(space, {"full": 1.0, "medium": 0.7, "small": 0.4})
    check_reachable(space, {"small": 0.4, "medium": 0.7})  # in any order
    with pytest.raises(ConfigError, match=r"budgets\.tiny: got 0\.1 .* within 2%; allowed: 0\.\d+ to 1\.0, near"):
        check_reachable(space, {"full": 1.0, "tiny": 0.1})
    with pytest.raises(ConfigError, match=r"budgets\.huge: got 1\.5; allowed: a fraction of the parent in \(0, 1\]"):
        check_reachable(space, {"huge": 1.5})
    coarse = make_space(heterogeneous, **{name: SIZES[name][:1] for name in SIZES} | {"hidden_size": (16, 8)})
    with pytest.raises(ConfigError, match=r"budgets\.medium: got 0\.8 .*change budgets or choices"):
        check_reachable(coarse, {"full": 1.0, "medium": 0.8})


CHAINS = [
    (0.88, 0.58),
    (0.9, 0.55),
    (0.75, 0.5),
    (0.7, 0.35),
    (0.6, 0.45),
    (0.8, 0.6, 0.4),
    (0.7, 0.6, 0.5),
    (0.45, 0.3),
    (0.95, 0.5),
]


def test_costs_that_come_in_lumps_are_nested_where_they_can_be():
    """Of a cache that is larger than all weights: against chains of combinations that are looked for one by one."""
    metric = Memory(400, chunk=1)
    sizes = {**SIZES, "mamba_head_dim": (6, 3), "hidden_size": (16, 13, 10), "intermediate_size": (24, 12)}
    space = ElasticSpace(LUMPY, Choices(**sizes | {"depth": (8, 7, 6, 5)}), (0, 1, 4, 6, 3, 5, 7, 2), metric=metric)
    full = exact_cost(metric, LUMPY)
    shares = {
        indices: exact_cost(metric, LUMPY, space.submodel(list(indices))) / full
        for indices in itertools.product(*(range(len(slot.sizes)) for slot in space.slots))
    }

    def chain(targets, bound):
        if not targets:
            return True
        inside = [
            indices
            for indices, share in shares.items()
            if abs(share / targets[0] - 1) <= 0.02 and all(i >= low for i, low in zip(indices, bound, strict=True))
        ]
        return any(chain(targets[1:], indices) for indices in inside)

    start, outcomes = [0] * len(space.slots), []
    for targets in CHAINS:
        budgets, possible = {f"b{i}": target for i, target in enumerate(targets)}, chain(targets, start)
        if not possible:
            with pytest.raises(ConfigError, match=r"budgets\.b\d: got 0\.\d+ \(\d+\.\d+ KiB\), which no combination"):
                check_reachable(space, budgets)
            outcomes.append("impossible")
            continue
        check_reachable(space, budgets)
        for seed in range(4):
            router = make_router(space, seed, targets)
            family = select_family(router)
            assert all(abs(shares[tuple(i)] / t - 1) <= 0.02 for i, t in zip(family, targets, strict=True))
            for larger, smaller in itertools.pairwise(family):
                assert all(i >= low for i, low in zip(smaller, larger, strict=True))
            log_probs = [prob.clamp(min=1e-30).log() for prob in router.probs(0)]
            greedy = select(space, log_probs, targets[0] * full, start, 0.02)
            outcomes.append("as most probable" if family[0] == greedy else "with room for the rest")
    assert set(outcomes) == {"impossible", "as most probable", "with room for the rest"}


def test_a_family_that_cannot_be_nested_says_so():
    """The medium model takes all the depth; then nothing inside it is of the small size."""
    space = make_space(hidden_size=(16,), intermediate_size=(24,), mamba_num_heads=(4,), mamba_head_dim=(6,))
    router = make_router(space, targets=(1.0, 0.2))
    with pytest.raises(ConfigError, match=r"budgets: no submodel nested in the next larger one is within 2% of 0\.2"):
        select_family(router)


@pytest.mark.parametrize(
    "sizes, words",
    [
        ({"hidden_size": (12, 8)}, r"choices\.hidden_size: got \[12, 8\]; .*starting with the parent's own 16$"),
        ({"hidden_size": (16, 8, 12)}, r"choices\.hidden_size: .*largest first"),
        ({"hidden_size": (16, 8, 8)}, r"choices\.hidden_size: .*different sizes"),
        ({"intermediate_size": (24, 0)}, r"choices\.intermediate_size: got \[24, 0\]"),
        ({"mamba_num_heads": (4, 3)}, r"choices\.mamba_num_heads: .*own 4, in multiples of 2$"),
        ({"num_attention_heads": (4, 1)}, r"choices\.num_attention_heads: .*own 4, in multiples of 2$"),
        ({"depth": (6, 5)}, r"choices\.depth: got \[6, 5\]; .*own 5$"),
        ({"depth": (5, 0)}, r"choices\.depth: got \[5, 0\]"),
    ],
)
def test_choices_say_what_is_wrong(sizes, words):
    with pytest.raises(ConfigError, match=words):
        make_space(**sizes)


def test_choices_left_out_keep_the_parents_size():
    space = ElasticSpace(CONFIG, Choices(depth=(5, 4)), RANKING)
    assert [slot.sizes for slot in space.slots] == [(16,), (24,), (4,), (6,), (4,), (5, 4)]
    assert space.submodel([0] * 5 + [1]).kept_layers == (0, 1, 2, 4)  # all but 3, the least important
    no_attention = NemotronHConfig(
        **CONFIG.to_dict() | {"layers_block_type": NemotronHConfig._pattern_to_list("M-M-M")}
    )
    axes = [slot.axis for slot in ElasticSpace(no_attention, Choices(**SIZES), RANKING).slots]
    assert axes == ["hidden", "ffn", "mamba_heads", "mamba_channels", "depth"]


@pytest.mark.parametrize("ranking", [(0, 1, 2, 3), (0, 1, 2, 3, 3), (1, 2, 3, 4, 5)])
def test_a_depth_ranking_of_other_layers_is_refused(ranking):
    with pytest.raises(ValueError, match=r"depth_ranking: got .*every layer 0\.\.4 once"):
        ElasticSpace(CONFIG, Choices(), ranking)
