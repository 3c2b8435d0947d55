"""Norm gains that every budget trains for itself: where they start, what moves them, and what a saved model has."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from elastic_core import ElasticModel, extract
from elastic_core.errors import UserError
from elastic_core.export import elastic_checkpoint
from elastic_core.model import architectures
from elastic_core.search.selection import Member
from elastic_core.training.loop import train
from elastic_core.training.routing import norm_factors, soft_gains
from elastic_core.training.run import Run
from elastic_core.training.stage import Routing
from tests.support.models.parents import random_ids, random_ratios, relative_error
from tests.support.models.routed_family import CONFIG
from tests.support.runs import BUDGETS, FULL, MEMBERS, make_run, make_stage

NAMES = architectures.norm_names(CONFIG)


def test_only_its_own_microbatches_move_the_gains_of_a_budget(data):
    """The full budget has the gains of the model, and a budget moves only channels and layers that it keeps."""
    run = make_run(data, make_stage(microbatches=1), private_norms=True)
    before = copy.deepcopy(run.norms)
    for row in train(run):
        trained = set(row["budgets"])
        for budget in run.norms.budgets:
            moved = run.norms._of(budget) != before._of(budget)
            assert bool(moved.any()) == (budget in trained), budget
            submodel = MEMBERS[budget].submodel
            assert not moved[:, submodel.hidden_size :].any()
            dropped = [i for i, name in enumerate(NAMES[:-1]) if int(name.split(".")[2]) not in submodel.kept_layers]
            assert not moved[dropped].any()
        before = copy.deepcopy(run.norms)


@pytest.mark.parametrize("hard", [False, True])
def test_gains_start_where_the_submodel_has_them(data, hard):
    run = make_run(data, make_stage(), routed=True, private_norms=True, routing=Routing(share=0.5, settle_steps=100))
    if hard:
        run = make_run(data, make_stage(), private_norms=True)
    else:
        for row in train(run):
            if row["step"] == 6:
                break
    ratios, sizes = (
        random_ratios(CONFIG).ratios,
        {name: member.submodel.hidden_size for name, member in run.members.items()},
    )
    for budget in run.norms.budgets:
        for name, gain in run.norms.of(budget).items():
            expected = run.model.get_parameter(name) * ratios[name][sizes[budget] - 1]
            torch.testing.assert_close(gain, expected, rtol=0, atol=0)
    assert run.norms.of("full") == {}


def test_soft_gates_at_one_choice_compute_what_its_slice_does(data):
    run = make_run(data, make_stage(), routed=True, private_norms=True)
    run.model.double()  # a nearly silent group makes rounding visible in float32
    space, ids = run.router.space, random_ids(CONFIG, 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        indices = [int(torch.randint(len(slot.sizes), (), generator=generator)) for slot in space.slots]
        probs = [
            F.one_hot(torch.tensor(i), len(slot.sizes)).float() for i, slot in zip(indices, space.slots, strict=True)
        ]
        with torch.no_grad():
            gains = soft_gains(run, norm_factors(run, probs))
            sliced = run.model.slice(gates=space.soft_gates(probs)).with_norm_gains(gains)
            soft = F.linear(run.model.hidden_states(ids, sliced), run.model.head(sliced))
            assert relative_error(soft, run.model(ids, space.submodel([int(i) for i in indices]))) < 1e-6


def test_a_trained_model_is_saved_with_the_gains_of_its_budgets(data, tmp_path):
    """Slice, file and extracted model agree after training, and gains have moved."""
    run = make_run(data, make_stage(learning_rate=1e-2), private_norms=True)
    start = copy.deepcopy(run.norms)
    list(train(run))
    run.model.save_pretrained(tmp_path / "family")
    elastic_checkpoint.write(tmp_path / "family", CONFIG, run.members, [], private_norms=True)
    loaded, ids = ElasticModel.from_pretrained(tmp_path / "family"), random_ids(CONFIG, 3)
    for budget in BUDGETS:
        submodel = extract(tmp_path / "family", budget, tmp_path / budget)
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(tmp_path / budget)(ids, use_cache=False).logits
            assert relative_error(run.model(ids, submodel), expected) < 1e-5
            assert relative_error(loaded(ids, submodel), expected) < 1e-5
    assert all((run.norms._of(budget) - start._of(budget)).abs().max() > 1e-2 for budget in run.norms.budgets)


def test_a_second_stage_goes_on_from_the_gains_of_the_first(data, tmp_path):
    run = make_run(data, make_stage(learning_rate=1e-2), private_norms=True)
    list(train(run))
    run.model.save_pretrained(tmp_path / "family")
    second = make_run(data, make_stage(), members=MEMBERS)
    assert second.norms is None
    model = ElasticModel.from_pretrained(tmp_path / "family")
    second = type(run)(model, run.stage, run.data, BUDGETS, members=MEMBERS, teacher=second.teacher)
    for budget in run.norms.budgets:
        torch.testing.assert_close(second.norms._of(budget), run.norms._of(budget), rtol=0, atol=0)
    list(train(second))
    assert not torch.equal(second.norms._of("small"), run.norms._of("small"))


def test_a_budget_that_is_the_whole_model_has_its_gains(data, tmp_path):
    """A budget just below 1 can have the whole model as its submodel; two budgets can have the same submodel."""
    members = {"full": Member(1.0, FULL), "almost": Member(0.99, FULL), "small": MEMBERS["small"]}
    members["smaller"] = Member(0.44, MEMBERS["small"].submodel)
    budgets = {name: member.target for name, member in members.items()}
    first = make_run(data, make_stage(microbatches=6, batch_size=6), private_norms=True)
    run = Run(first.model, first.stage, first.data, budgets, members=members, teacher=first.teacher)
    before = copy.deepcopy(run.norms)
    list(train(run))
    moved = {budget: not torch.equal(run.norms._of(budget), before._of(budget)) for budget in run.norms.budgets}
    assert moved == {"almost": False, "small": True, "smaller": False}
    run.model.save_pretrained(tmp_path / "family")
    elastic_checkpoint.write(tmp_path / "family", CONFIG, members, [], private_norms=True)
    loaded, ids = ElasticModel.from_pretrained(tmp_path / "family"), random_ids(CONFIG, 3)
    for budget in budgets:
        submodel, sliced = elastic_checkpoint.find_submodel(tmp_path / "family", budget), run.slice_of_budget(budget)
        with torch.no_grad():
            trained = F.linear(run.model.hidden_states(ids, sliced), run.model.head(sliced))
            assert relative_error(loaded(ids, submodel), trained) < 1e-6


def test_members_that_are_not_nested_are_refused_before_training(data):
    wide = dataclasses.replace(MEMBERS["small"].submodel, hidden_size=15)
    with pytest.raises(UserError, match=r"budget small .* is not nested in medium"):
        make_run(data, make_stage(), members=MEMBERS | {"small": Member(0.45, wide)}, private_norms=True)


def test_budgets_with_other_names_start_from_the_gains_of_their_submodels(data):
    first = make_run(data, make_stage(), private_norms=True)
    list(train(first))
    members = {"whole": MEMBERS["full"], "half": MEMBERS["small"]}
    budgets = {name: member.target for name, member in members.items()}
    run = Run(first.model, first.stage, first.data, budgets, members=members, teacher=first.teacher)
    torch.testing.assert_close(run.norms._of("half"), first.norms._of("small"), rtol=0, atol=0)
