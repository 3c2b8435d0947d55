"""The router: what it draws, what it costs, how it learns, and that whatever it chooses is nested."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from elastic_core.cost.metrics import num_parameters
from elastic_core.search.router import Router, anneal, noise_generator
from elastic_core.search.selection import select_family
from elastic_core.training.losses import resource_loss
from tests.support.models.routed_family import CONFIG, PER_LAYER, TARGETS, make_router, make_space


@pytest.fixture(params=[(), PER_LAYER], ids=["homogeneous", "heterogeneous"])
def space(request):
    return make_space(request.param)


def one_hots(space, indices):
    return [F.one_hot(torch.tensor(i), len(slot.sizes)).double() for i, slot in zip(indices, space.slots, strict=True)]


def random_indices(space, generator):
    return [int(torch.randint(len(slot.sizes), (), generator=generator)) for slot in space.slots]


def random_probs(space, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(slot.sizes), generator=generator, dtype=dtype).softmax(-1) for slot in space.slots]


def test_one_slot_per_axis_or_per_layer(space):
    per_layer = len(space.slots) > 6
    names = [slot.axis for slot in space.slots]
    expected = ["hidden", "ffn", "mamba_heads", "mamba_channels", "attention_heads", "depth"]
    if per_layer:  # two MLPs, two Mamba layers, one attention layer
        expected[1:3] = ["ffn", "ffn", "mamba_heads", "mamba_heads"]
    assert names == expected


def test_full_budget_is_pinned_whatever_the_router_says(space):
    router = make_router(space, seed=1, spread=20)
    for step, (tau, scale) in enumerate([(1.0, 1.0), (0.05, 10.0)]):
        for prob in router.probs(0, tau, scale, noise_generator(0, step, 0)):
            assert prob.tolist() == [1.0] + [0.0] * (len(prob) - 1)
    assert router.choices()[0] == [0] * len(space.slots)
    assert select_family(router)[0] == [0] * len(space.slots)


def by_hand(router, index, tau, scale, noise=None):
    """Eqs. 6 to 9 weight by weight, and the distribution of the maximum by enumeration."""
    if router.targets[index] == 1.0:
        return [one.float() for one in one_hots(router.space, [0] * len(router.space.slots))]
    logits, budget = [], torch.eye(len(router.targets))[index]
    for axis, network in router.networks.items():
        first, second = network[0], network[2]
        h = first.weight @ budget + first.bias
        z = second.weight @ torch.where(h > 0, h, 0.01 * h) + second.bias
        start = 0
        for slot in router.space.slots:
            if slot.axis == axis:
                logits.append(z[start : start + len(slot.sizes)])
                start += len(slot.sizes)
        assert start == len(z)
    own = []
    for z in logits:
        gumbel = torch.zeros_like(z)
        if noise is not None:
            gumbel = -torch.empty(len(z)).exponential_(generator=noise).log()
        weight = torch.exp((scale * z + gumbel) / tau)
        own.append(weight / weight.sum())
    larger = by_hand(router, index - 1, tau, scale) if index else [torch.eye(len(p))[0] for p in own]
    probs = []
    for mine, bound in zip(own, larger, strict=True):
        prob = [0.0] * len(mine)
        for i, j in itertools.product(range(len(mine)), repeat=2):
            prob[max(i, j)] += float(mine[i] * bound[j])
        probs.append(torch.tensor(prob))
    return probs


@pytest.mark.parametrize("targets", [TARGETS, (0.8, 0.6, 0.4)])
def test_probs_are_those_of_the_larger_of_own_and_bound(space, targets):
    router = make_router(space, seed=2, targets=targets, spread=2)
    with torch.no_grad():
        for index, (tau, scale) in itertools.product(range(len(targets)), [(1.0, 1.0), (0.5, 3.0)]):
            for noisy in (False, True):
                probs = router.probs(index, tau, scale, noise_generator(5, 6, 7) if noisy else None)
                expected = by_hand(router, index, tau, scale, noise_generator(5, 6, 7) if noisy else None)
                for prob, reference in zip(probs, expected, strict=True):
                    torch.testing.assert_close(prob, reference, rtol=1e-5, atol=1e-6)
                    assert float(prob.sum()) == pytest.approx(1, abs=1e-6) and float(prob.min()) >= 0


def test_smaller_budgets_never_gain_probability_of_large_sizes(space):
    """First-order dominance: at every size, a smaller budget is at least as likely to be at or below it."""
    router = make_router(space, seed=3, spread=4)
    with torch.no_grad():
        for larger, smaller in itertools.pairwise(range(len(TARGETS))):
            for high, low in zip(router.probs(larger), router.probs(smaller), strict=True):
                assert (low.cumsum(-1) <= high.cumsum(-1) + 1e-6).all()


def test_noise_is_a_function_of_seed_step_and_microbatch_alone(space):
    router = make_router(space)

    def draw(*place):
        return torch.cat([p.detach() for p in router.probs(2, noise=noise_generator(*place))])

    torch.manual_seed(1)
    first = draw(3, 4, 5)
    torch.manual_seed(2)
    torch.rand(7)
    before = torch.get_rng_state()
    assert torch.equal(first, draw(3, 4, 5))
    assert torch.equal(before, torch.get_rng_state())
    for other in [(4, 4, 5), (3, 5, 5), (3, 4, 6), (4, 3, 5), (3, 5, 4), (0, 0, 0)]:
        assert not torch.equal(first, draw(*other))


def test_noise_is_gumbel():
    """argmax(z + Gumbel noise) is distributed as softmax(z)."""
    space = make_space()
    router = make_router(space, targets=(0.5,), spread=1.5)
    with torch.no_grad():
        expected = router.probs(0)
        draws = [[int(p.argmax()) for p in router.probs(0, 0.1, 1.0, noise_generator(0, i, 0))] for i in range(600)]
    for slot, reference in enumerate(expected):
        counts = torch.bincount(torch.tensor([draw[slot] for draw in draws]), minlength=len(reference))
        sigma = (reference * (1 - reference) / len(draws)).sqrt()
        assert ((counts / len(draws) - reference).abs() < 4 * sigma).all()


def test_annealing_end_points():
    taus, scales = (1.0, 0.05), (1.0, 10.0)
    assert anneal(0.0, taus, scales) == pytest.approx((1.0, 1.0))
    assert anneal(1.0, taus, scales) == pytest.approx((0.05, 10.0))
    assert anneal(7.0, taus, scales) == anneal(1.0, taus, scales) and anneal(-1.0, taus, scales) == (1.0, 1.0)
    assert anneal(0.5, taus, scales) == pytest.approx(((1.0 * 0.05) ** 0.5, 5.5))  # geometric, arithmetic mean


def test_gradient_reaches_every_weight_of_every_axis(space):
    router = make_router(space)
    cost = space.cost(router.probs(2, 0.7, 2.0, noise_generator(0, 0, 0)))
    resource_loss(cost, 0.3 * num_parameters(CONFIG)).backward()
    assert set(router.networks) == {slot.axis for slot in space.slots}
    for axis, network in router.networks.items():
        for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
            gradient = network.get_parameter(name).grad
            assert gradient is not None and gradient.abs().max() > 0, (axis, name)
        columns = network[0].weight.grad.abs().amax(0) > 0  # the bound given by larger budgets is detached
        assert columns.tolist() == [False, False, True, False]


def test_soft_gates_at_one_hot_are_prefix_masks(space):
    smallest = [len(slot.sizes) - 1 for slot in space.slots]
    gates = space.soft_gates([p.float() for p in one_hots(space, smallest)])
    assert gates["hidden"].tolist() == [1.0] * 8 + [0.0] * 8
    for layer in (1, 3):
        assert gates[f"ffn.{layer}"].tolist() == [1.0] * 8 + [0.0] * 16
    for layer in (0, 4):  # half of the heads of each of two groups
        assert gates[f"mamba_heads.{layer}"].tolist() == [1.0, 0.0, 1.0, 0.0]
        assert gates[f"mamba_channels.{layer}"].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert gates["attention_heads.2"].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert gates["depth"].tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]  # layers 0, 2, 1
    assert set(gates) == {*space.units, "depth"}


def test_soft_gates_mix_the_masks(space):
    probs = random_probs(space, 0, torch.float32)
    gates = space.soft_gates(probs)
    torch.testing.assert_close(gates["hidden"][9], probs[0][:4].sum())  # channel 9: kept by 16, 14, 12 and 10
    torch.testing.assert_close(gates["depth"][4], probs[-1][:2].sum())  # the fourth of the ranking
    torch.testing.assert_close(gates["hidden"].sum(), probs[0] @ torch.tensor([16.0, 14, 12, 10, 8]))


def test_hard_gates_have_value_one_and_the_gradient_of_the_logarithm(space):
    probs = [p.requires_grad_() for p in random_probs(space, 1)]
    indices = [int(p.argmax()) for p in probs]
    gates = space.hard_gates(probs, indices)
    assert set(gates) == {*space.units, "depth"}
    assert all((gate == 1).all() for gate in gates.values())
    gates["hidden"].backward()
    expected = torch.zeros_like(probs[0])
    expected[indices[0]] = 1 / probs[0][indices[0]].detach()
    torch.testing.assert_close(probs[0].grad, expected)


def test_cost_at_one_hot_is_the_number_of_parameters(space):
    generator = torch.Generator().manual_seed(4)
    for _ in range(12):
        indices = random_indices(space, generator)
        exact = num_parameters(CONFIG, space.submodel(indices))
        assert space.cost(one_hots(space, indices)).item() == exact == space.exact_cost(indices)


@pytest.mark.parametrize("heterogeneous", [(), ("intermediate_size", "mamba_num_heads")])
def test_cost_in_between_is_the_expectation(heterogeneous):
    """Against every submodel of the space, weighted by its probability."""
    small = {"hidden_size": (16, 8), "intermediate_size": (24, 8), "mamba_head_dim": (6, 2), "depth": (5, 4, 3)}
    space = make_space(heterogeneous, **small)
    probs = random_probs(space, 5)
    total = 0.0
    for indices in itertools.product(*(range(len(slot.sizes)) for slot in space.slots)):
        weight = torch.stack([prob[i] for prob, i in zip(probs, indices, strict=True)]).prod()
        total += weight.item() * num_parameters(CONFIG, space.submodel(list(indices)))
    assert space.cost(probs).item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_chosen_families_are_nested(space, seed):
    router = make_router(space, seed=seed, spread=3)
    for family in (router.choices(), select_family(router)):
        submodels = [space.submodel(indices) for indices in family]
        for larger, smaller in itertools.pairwise(submodels):
            assert smaller.is_within(larger, CONFIG)
    full = num_parameters(CONFIG)
    for target, indices in zip(TARGETS, family, strict=True):
        assert abs(num_parameters(CONFIG, space.submodel(indices)) / (target * full) - 1) <= 0.02


@pytest.mark.parametrize("targets", [(0.5, 1.0), (1.0, 1.0), (1.2, 0.5), (0.5, 0.0)])
def test_bad_targets(targets):
    with pytest.raises(ValueError, match=r"budgets: got .*largest first"):
        Router(make_space(), targets)
