"""The final choice: candidates compared by their measured KL, whatever the router believes."""

import itertools
import math

import pytest
import torch

from elastic_core.cost.metrics import num_parameters
from elastic_core.data.loader import IGNORED_LABEL
from elastic_core.search.router import Router
from elastic_core.search.selection import select_family
from elastic_core.search.space import ElasticSpace
from elastic_core.training import candidates
from elastic_core.training.candidates import choose_family
from elastic_core.training.stage import Routing
from tests.support.models.routed_family import CONFIG, PER_LAYER, make_space
from tests.support.runs import BUDGETS, TEXT, make_run, make_stage


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    monkeypatch.setattr(candidates, "MOST_PARTS", 4)


def opinionated(space: ElasticSpace, seed: int) -> Router:
    torch.manual_seed(seed)
    router = Router(space, tuple(BUDGETS.values()))
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.mul_(4)
    return router


def run_of(data, seed, heterogeneous=(), teacher=True, num_candidates=1000, **stage):
    """A run whose model is a little away from its teacher, and a router with opinions."""
    run = make_run(
        data, make_stage(**stage), routed=True, routing=Routing(candidates=num_candidates), teacher=teacher, seed=0
    )
    with torch.no_grad():
        for number, parameter in enumerate(run.model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.02 * noise * parameter.std())
    run.router = opinionated(make_space(heterogeneous), seed)
    return run


def measured_kl(run, indices):
    """The KL of a combination on the text of all parts, from whole logits."""
    rows = run.stage.batch_size // run.stage.microbatches * candidates.MOST_PARTS
    input_ids, labels, documents = run.data.batch(0, rows)
    teacher = run.teacher or run.model
    with torch.no_grad():
        expected = teacher(input_ids, document_ids=documents).log_softmax(-1)
        found = teacher(input_ids, run.router.space.submodel(indices), document_ids=documents).log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1)[labels != IGNORED_LABEL].mean().item()


def test_with_enough_candidates_the_router_has_no_say(data, monkeypatch):
    """Without halving and with all families in the beam, every router's seed leads to the same family."""
    monkeypatch.setattr(candidates, "ROUNDS", 1)
    monkeypatch.setattr(candidates, "BEAM", 10_000)
    monkeypatch.setattr(candidates, "MOST_PARTS", 2)
    runs = [run_of(data, seed, budget_shares={"full": 0.2, "medium": 0.5, "small": 0.3}) for seed in range(3)]
    families = [choose_family(run)[0] for run in runs]
    assert families[0] == families[1] == families[2]
    own = [select_family(run.router, run.routing.scales[1]) for run in runs]
    assert not own[0] == own[1] == own[2]


@pytest.mark.parametrize("heterogeneous", [(), PER_LAYER], ids=["homogeneous", "heterogeneous"])
@pytest.mark.parametrize("seed", range(2))
def test_the_chosen_family_is_never_worse_than_the_routers_own(data, seed, heterogeneous):
    run = run_of(data, seed, heterogeneous, num_candidates=6)
    calls = []
    run.progress = lambda *call: calls.append(call)
    family, found = choose_family(run)
    own = select_family(run.router, run.routing.scales[1])
    assert found["router"]["indices"] == own and found["chosen"]["indices"] == family
    assert found["chosen"]["weighted_kl"] <= found["router"]["weighted_kl"]
    for name, indices in (("chosen", family), ("router", own)):
        told = found[name]
        weighted = 0.0
        for index, budget in enumerate(BUDGETS):
            if budget != "full":
                kl = measured_kl(run, indices[index])
                assert told["kl"][budget] == pytest.approx(kl, rel=1e-3)
                weighted += kl / 3  # budgets have equal shares
        assert told["weighted_kl"] == pytest.approx(weighted, rel=1e-3)
    for budget, target in BUDGETS.items():
        if budget == "full":
            continue
        rows = found["candidates"][budget]
        assert len({tuple(row["indices"]) for row in rows}) == len(rows) > 1
        for row in rows:
            cost = run.router.space.exact_cost(row["indices"])
            assert abs(cost / (target * num_parameters(CONFIG)) - 1) <= 0.02
        assert rows[0]["tokens"] > rows[-1]["tokens"] > 0
        done = [(done, total) for what, done, total in calls if what == f"candidates of {budget}"]
        assert [number for number, _ in done] == list(range(1, done[0][1] + 1))
    for larger, smaller in itertools.pairwise(family):
        assert all(low >= high for high, low in zip(larger, smaller, strict=True))


def test_the_comparison_can_be_done_again(data):
    """A killed run chooses the same: nothing is drawn, and nothing of the run changes."""
    run = run_of(data, 0, num_candidates=4)
    weights = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    torch.manual_seed(1)
    first = choose_family(run)
    torch.manual_seed(2)
    assert choose_family(run) == first
    assert all(torch.equal(weights[name], parameter) for name, parameter in run.model.named_parameters())
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_what_the_model_has_learnt_so_far_does_not_count(data):
    """Its weights have adapted to the sizes that the router preferred."""
    first, second = (run_of(data, 0, num_candidates=4) for _ in range(2))
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.mul_(1.1)
    assert choose_family(first) == choose_family(second)


def test_one_candidate_is_the_routers_own(data):
    run = run_of(data, 0, num_candidates=1)
    assert choose_family(run) == (select_family(run.router, run.routing.scales[1]), None)


def test_without_a_frozen_teacher_the_full_model_is_it(data):
    run = run_of(data, 0, num_candidates=3, teacher=False, loss=TEXT)
    family, found = choose_family(run)
    assert found["chosen"]["kl"]["small"] == pytest.approx(measured_kl(run, family[2]), rel=1e-3)


def test_a_model_that_computes_no_number_keeps_the_routers_own(data):
    run = run_of(data, 0, num_candidates=3)
    with torch.no_grad():
        run.teacher.get_parameter("model.norm_f.weight")[0] = math.nan
    family, found = choose_family(run)
    assert found["chosen"] == found["router"] and found["router"]["weighted_kl"] is None
    assert family == select_family(run.router, run.routing.scales[1])
