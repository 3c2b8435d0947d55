"""The loop: what a step computes and moves, how the router settles, and that a run survives being killed."""

import contextlib
import copy
import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, NemotronHConfig

from elastic_core import extract, rank, sort_
from elastic_core.cost.metrics import num_parameters
from elastic_core.data.loader import IGNORED_LABEL, PackedSequences
from elastic_core.export import elastic_checkpoint
from elastic_core.model.dims import layer_index, narrow
from elastic_core.search.choices import Choices
from elastic_core.search.router import Router, noise_generator
from elastic_core.search.space import ElasticSpace
from elastic_core.training.checkpoint import Checkpoints
from elastic_core.training.loop import NonFiniteError, train
from elastic_core.training.run import Run, resume
from elastic_core.training.stage import Loss, Routing, assign_budgets
from tests.support.models.parents import random_elastic, random_llama_config, relative_error
from tests.support.models.routed_family import CONFIG
from tests.support.runs import (
    BUDGETS,
    FULL,
    MEMBERS,
    SMALL,
    TEXT,
    assert_same,
    make_router,
    make_run,
    make_stage,
    measured_on_little_text,
    routed_run,
    rows_without_time,
)

pytestmark = pytest.mark.usefixtures("little_text")


def snapshot(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def gradients_of_first_step(run):
    """The gradients that the optimizer is given in the first step."""
    found = {}

    def remember(*_):
        for prefix, module in (("", run.model), ("router.", run.router)):
            if module is not None:
                found.update(
                    {prefix + name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
                )

    handle = run.optimizer.register_step_pre_hook(remember)
    row = next(train(run))
    handle.remove()
    return found, row


# What a step computes


def naive_loss(logits, teacher_logits, labels, weights):
    live = labels != IGNORED_LABEL
    ce = F.cross_entropy(logits[live], labels[live])
    t = weights.temperature
    student = (logits[live] / t).log_softmax(-1)
    kl = F.kl_div(student, (teacher_logits[live] / t).log_softmax(-1), reduction="batchmean", log_target=True)
    return weights.ce_weight * ce + weights.kl_weight * t**2 * kl, ce, kl


@pytest.mark.parametrize("routed", [False, True], ids=["hard", "soft"])
def test_gradient_of_a_whole_step_is_that_of_plain_losses_on_whole_logits(data, routed):
    weights = {"full": Loss(1.0, 0.0), "medium": Loss(0.3, 0.7, 2.0), "small": Loss(0.0, 1.0)}
    stage = make_stage(batch_size=12, microbatches=6, gradient_clip=1e9, loss_by_budget=weights)
    run = make_run(data, stage, routed, routing=Routing(weight=0.5, dead_zone=0.0), seed=4)
    with torch.no_grad():
        for parameter in run.teacher.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)))
    model, router = copy.deepcopy(run.model), copy.deepcopy(run.router)
    passes = []
    run.teacher.model.register_forward_hook(lambda *_: passes.append(1))
    found, row = gradients_of_first_step(run)

    dealt = [result["budget"] for result in row["microbatches"]]
    assert set(dealt) == set(BUDGETS)
    assert len(passes) == len(dealt) - dealt.count("full")  # full learns from text alone
    input_ids, labels, documents = run.data.batch(0, 12)
    assert (labels == IGNORED_LABEL).any()  # some rows are padded
    for i, budget in enumerate(dealt):
        part = slice(2 * i, 2 * i + 2)
        if routed:
            probs = router.probs(list(BUDGETS).index(budget), 1.0, 1.0, noise_generator(4, 0, i))
            logits = model(input_ids[part], gates=router.space.soft_gates(probs), document_ids=documents[part])
            cost = router.space.cost(probs) / num_parameters(CONFIG)
            resource = 0.5 * (cost / BUDGETS[budget] - 1).abs()
        else:
            logits, resource = model(input_ids[part], MEMBERS[budget].submodel, document_ids=documents[part]), 0.0
        teacher_logits = run.teacher(input_ids[part], document_ids=documents[part]).detach()
        loss, ce, kl = naive_loss(logits, teacher_logits, labels[part], weights[budget])
        ((loss + resource) / len(dealt)).backward()
        assert row["microbatches"][i]["ce"] == pytest.approx(ce.item(), rel=1e-5)
        if weights[budget].kl_weight:
            assert row["microbatches"][i]["kl"] == pytest.approx(kl.item(), rel=1e-4)
    expected = dict(model.named_parameters())
    if routed:
        expected |= {f"router.{name}": parameter for name, parameter in router.named_parameters()}
    scale = max(p.grad.abs().max() for p in model.parameters())
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5 * scale.item(), msg=name)


def test_full_budget_has_nothing_to_learn_from_its_own_copy(data):
    stage = make_stage(loss=Loss(0.0, 1.0, temperature=1.7))
    row = next(train(make_run(data, stage, members={"full": MEMBERS["full"]})))
    assert row["grad_norm"] == 0 and all(result["kl"] == 0 for result in row["microbatches"])


def outside(name, dims, submodel):
    """Boolean mask of the elements of a parameter that are no part of `submodel`."""
    size = [dim.size for dim in dims]
    if (layer := layer_index(name)) is not None and layer not in submodel.kept_layers:
        return torch.ones(size, dtype=torch.bool)
    kept = torch.zeros(size, requires_grad=True)
    narrow(kept, dims, submodel.sizes(CONFIG)).sum().backward()
    return kept.grad == 0


def test_a_hard_step_touches_only_the_slice(data):
    stage = make_stage(weight_decay=0.0)
    run = make_run(data, stage, members={"small": MEMBERS["small"]})
    before = snapshot(run.model)
    found, _ = gradients_of_first_step(run)
    after, moved = snapshot(run.model), 0
    for name, dims in run.model.layout.items():
        mask = outside(name, dims, SMALL)
        assert torch.equal(before[name][mask], after[name][mask]), name
        if layer_index(name) in (3, 4):
            assert found[name] is None, name
        else:
            assert (found[name][mask] == 0).all() and (found[name][~mask] != 0).any(), name
            moved += int((before[name] != after[name]).sum())
    assert moved > 0.8 * num_parameters(CONFIG, SMALL)


def run_until_small_follows_full(data, **values):
    """A run whose next step is one of the small budget alone, after steps of the full one; weights before and after."""
    stage = make_stage(microbatches=1, budget_shares={"full": 0.5, "small": 0.5}, steps=40, loss=TEXT, **values)
    run = make_run(data, stage, teacher=False)
    seen = set()
    rows = train(run)
    while True:
        before, state = snapshot(run.model), copy.deepcopy(run.optimizer.state_dict()["state"])
        budget = next(rows)["microbatches"][0]["budget"]
        if budget == "small" and "full" in seen:
            return run, before, state
        seen.add(budget)


def test_a_layer_that_no_microbatch_ran_stays_bit_identical(data):
    """Neither weight decay nor the momentum of earlier steps moves it."""
    run, before, _ = run_until_small_follows_full(data, weight_decay=0.5)
    after = snapshot(run.model)
    for name in run.model.layout:
        dropped = layer_index(name) in (3, 4)
        assert torch.equal(before[name], after[name]) == dropped, name


def test_outside_the_slice_a_kept_layer_goes_on_by_momentum_and_weight_decay(data):
    """Adam is dense: elements of a kept layer that the slice leaves out move as if their gradient were zero."""
    run, before, state = run_until_small_follows_full(data, weight_decay=0.5)
    after, name = snapshot(run.model), "model.layers.1.mixer.up_proj.weight"
    mask = outside(name, run.model.layout[name], SMALL)
    group = run.optimizer.param_groups[0]
    position = next(i for i, p in enumerate(group["params"]) if p is run.model.get_parameter(name))
    old, (beta1, beta2), rate = state[position], group["betas"], group["lr"]
    step = float(old["step"]) + 1
    mean = beta1 * old["exp_avg"] / (1 - beta1**step)
    square = beta2 * old["exp_avg_sq"] / (1 - beta2**step)
    expected = before[name] * (1 - rate * 0.5) - rate * mean / (square.sqrt() + group["eps"])
    assert (before[name][mask] != after[name][mask]).any()
    torch.testing.assert_close(after[name][mask], expected[mask], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("pattern", ["-*-", "-*M"])
def test_bfloat16_with_its_own_teacher_reaches_every_weight(data, pattern):
    """Autocast remembers weights it has cast: those cast for the teacher, without gradients, must not serve the rest.

    Mamba: `ops.ssd` computes in bfloat16 under autocast and fails in its backward; it has to switch autocast off.
    """
    config = NemotronHConfig(**CONFIG.to_dict() | {"layers_block_type": NemotronHConfig._pattern_to_list(pattern)})
    stage = make_stage(precision="bfloat16", teacher="trainable", microbatches=2, loss=Loss(1.0, 1.0))
    model = random_elastic(0, config)
    torch.manual_seed(0)
    router = Router(ElasticSpace(config, Choices(hidden_size=(16, 8)), (0, 1, 2)), (1.0, 0.6))
    sequences = PackedSequences(data, stage.mixture, stage.sequence_length, seed=1)
    run = Run(model, stage, sequences, {"full": 1.0, "small": 0.6}, router=router)
    found, row = gradients_of_first_step(run)
    assert {r["budget"] for r in row["microbatches"]} == {"full", "small"}
    assert all(found[name] is not None and found[name].abs().sum() > 0 for name in model.layout)
    assert all(math.isfinite(r["total"]) for r in row["microbatches"])


# Teachers


def test_trainable_teacher_is_the_familys_own_full_model(data):
    weights = {"full": TEXT, "small": Loss(0.0, 1.0)}
    stage = make_stage(teacher="trainable", loss_by_budget=weights, loss=TEXT)
    run = make_run(data, stage, teacher=False)
    model = copy.deepcopy(run.model)
    row = next(train(run))
    input_ids, labels, documents = run.data.batch(0, 6)
    for i, result in enumerate(row["microbatches"]):
        part = slice(2 * i, 2 * i + 2)
        logits = model(input_ids[part], MEMBERS[result["budget"]].submodel, document_ids=documents[part])
        _, ce, kl = naive_loss(logits, model(input_ids[part], document_ids=documents[part]), labels[part], TEXT)
        expected = kl.item() if result["budget"] == "small" else 0.0
        assert result["kl"] == pytest.approx(expected, rel=1e-4)
        assert result["loss"] == pytest.approx(ce.item() if result["budget"] != "small" else kl.item(), rel=1e-4)


def test_no_gradient_flows_into_the_teacher(data):
    stage = make_stage(teacher="trainable", loss=Loss(1.0, 1.0), microbatches=1)
    run = make_run(data, stage, teacher=False)
    for row in itertools.islice(train(run), 12):
        if row["microbatches"][0]["budget"] == "small":
            break
        run.optimizer.state.clear()
    found = [p.grad for p in run.model.parameters()]
    assert row["microbatches"][0]["budget"] == "small" and row["microbatches"][0]["kl"] > 0
    assert all(grad is None for grad in found)
    states = {id(p) for p in run.optimizer.state}
    for name, parameter in run.model.named_parameters():
        assert (id(parameter) in states) == (layer_index(name) not in (3, 4)), name


def test_mixed_teachers_move_from_the_parent_to_the_family(data):
    """Where the model has moved away from the parent, the two teachers give different losses."""
    stage = make_stage(teacher="mixed", loss=Loss(0.5, 1.0), steps=30, microbatches=1, learning_rate=1e-2)
    run = make_run(data, stage)
    full = [row["microbatches"][0]["kl"] for row in train(run) if row["microbatches"][0]["budget"] == "full"]
    assert len(full) >= 8
    third = len(full) // 3
    own = [kl == 0 for kl in full]  # the full budget has no teacher where it would be its own
    assert sum(own[:third]) < sum(own[-third:]) and not all(own) and any(own)


def test_frozen_teacher_is_never_changed(trained):
    run, _, teacher = trained
    assert all(torch.equal(p, teacher[name]) for name, p in run.teacher.named_parameters())
    assert not any(p.requires_grad for p in run.teacher.parameters())
    assert any(not torch.equal(p, teacher[name]) for name, p in run.model.named_parameters())


@pytest.mark.parametrize(
    "stage, values, words",
    [
        (
            {},
            {"teacher": False},
            r"loss\.kl_weight: got 1\.0 for budget full, but no model for the frozen teacher",
        ),
        (
            {"teacher": "mixed"},
            {"teacher": False},
            r"loss\.kl_weight: got 1\.0 for budget full, but no model for the mixed",
        ),
        (
            {"teacher": "trainable"},
            {},
            r"teacher: got trainable, so budget full is the teacher, but it has ce_weight 0\.0",
        ),
        ({"teacher": "mixed"}, {}, r"teacher: got mixed, so budget full is the teacher, but it has ce_weight 0\.0"),
        (
            {"teacher": "trainable", "loss": TEXT, "budget_shares": {"small": 1.0}},
            {},
            r"teacher: .*budget full .*share of 0\.0; set both above 0",
        ),
        (
            {"teacher": "trainable", "loss": TEXT},
            {"members": {"small": MEMBERS["small"]}},
            r"teacher: got trainable, which needs a budget of 1\.0",
        ),
        ({"budget_shares": {"tiny": 1.0}}, {}, r"budget_shares: got tiny; allowed: the budgets full, medium, small"),
        ({"loss_by_budget": {"tiny": TEXT}}, {}, r"loss_by_budget: got tiny; allowed: the budgets full"),
    ],
)
def test_a_run_that_cannot_learn_is_refused_before_it_starts(data, stage, values, words):
    with pytest.raises(ValueError, match=words):
        make_run(data, make_stage(**stage), **values)


def test_teachers_that_do_not_fit_are_refused(data):
    run = make_run(data, make_stage())
    other = random_elastic(0, type(CONFIG)(**CONFIG.to_dict() | {"vocab_size": 40}))
    with pytest.raises(ValueError, match=r"teacher: got a vocabulary of 40; allowed: 32"):
        dataclasses.replace(run, teacher=other)
    with pytest.raises(ValueError, match=r"teacher: got the model itself"):
        dataclasses.replace(run, teacher=run.model)
    with pytest.raises(ValueError, match=r"give either the members .* or a router"):
        dataclasses.replace(run, router=make_router())
    no_kl = make_stage(loss=TEXT, budget_shares={"small": 1.0}, loss_by_budget={"full": Loss(0.0, 1.0)})
    make_run(data, no_kl, teacher=False)  # a budget that is never dealt needs no teacher


# A whole stage


@pytest.fixture(scope="module")
def trained(data):
    """One stage with a router: soft for 48 steps, then hard."""
    stage = make_stage(steps=80, learning_rate=1e-2, budget_shares={"full": 0.2, "medium": 0.4, "small": 0.4})
    run = make_run(data, stage, routed=True, routing=Routing(share=0.6, dead_zone=0.02, candidates=4), seed=2)
    teacher = snapshot(run.teacher)
    with measured_on_little_text():
        return run, list(train(run)), teacher


def test_a_stage_goes_from_soft_to_sliced_and_reaches_its_budgets(trained):
    run, rows, _ = trained
    assert [row["mode"] for row in rows] == ["soft"] * 48 + ["hard"] * 32
    assert [row["step"] for row in rows] == list(range(1, 81))
    assert rows[-1]["tokens"] == 80 * 6 * 16
    assert run.members["full"].submodel == FULL
    for name, member in run.members.items():
        assert member.target == BUDGETS[name]
        assert abs(num_parameters(CONFIG, member.submodel) / (member.target * num_parameters(CONFIG)) - 1) <= 0.02
    for larger, smaller in itertools.pairwise(run.members.values()):
        assert smaller.submodel.is_within(larger.submodel, CONFIG)


def test_the_router_itself_finds_its_budgets(trained):
    """Not only what is selected from its distribution at the end."""
    soft = [r for row in trained[1] if row["mode"] == "soft" for r in row["microbatches"]]
    full = num_parameters(CONFIG)
    for budget, target in BUDGETS.items():
        costs = [r["cost"] / full for r in soft if r["budget"] == budget]
        assert np.mean(costs[-8:]) == pytest.approx(target, rel=0.08), budget
    off = [np.mean([r["router_loss"] for r in part if r["budget"] == "small"]) for part in (soft[:30], soft[-30:])]
    assert off[1] < 0.3 * off[0]


def test_a_llama_becomes_a_family(data, tmp_path):
    """Ranked, sorted, routed, trained, extracted: every budget is a stock Llama and computes what its slice does."""
    config = random_llama_config(11)
    assert config.model_type == "llama" and not config.tie_word_embeddings and config.num_attention_heads == 6
    model = random_elastic(11, config)
    ranking = rank(model, [data_batch(data, start) for start in (0, 4)])
    teacher = copy.deepcopy(sort_(model, ranking))
    sizes = {"hidden_size": (30, 24, 18), "intermediate_size": tuple(range(19, 2, -1)), "num_attention_heads": (6, 2)}
    space = ElasticSpace(config, Choices(**sizes, depth=(4, 3, 2)), ranking.depth)
    torch.manual_seed(0)
    router = Router(space, tuple(BUDGETS.values()))
    stage = make_stage(steps=40, learning_rate=3e-3)
    rows = PackedSequences(data, stage.mixture, stage.sequence_length, seed=1)
    routing = Routing(share=0.6, dead_zone=0.02, candidates=4)
    run = Run(model, stage, rows, BUDGETS, router=router, teacher=teacher, routing=routing, seed=2)
    losses = [[part["kl"] for part in row["microbatches"] if part["budget"] == "small"] for row in train(run)]
    assert np.mean(losses[-5:]) < np.mean(losses[25:30])  # sliced since step 24
    model.save_pretrained(tmp_path / "family")
    elastic_checkpoint.write(tmp_path / "family", config, run.members, [])
    input_ids = rows.batch(0, 2).input_ids
    for budget, target in BUDGETS.items():
        submodel = extract(tmp_path / "family", budget, tmp_path / budget)
        extracted = AutoModelForCausalLM.from_pretrained(tmp_path / budget)
        count = sum(parameter.numel() for parameter in extracted.parameters())
        assert count == num_parameters(config, submodel) and abs(count / num_parameters(config) / target - 1) < 0.05
        with torch.no_grad():
            logits = extracted(input_ids, use_cache=False).logits
            assert relative_error(model(input_ids, submodel), logits) < 1e-5


def data_batch(data, start):
    """Four rows of text, as a calibration batch."""
    return PackedSequences(data, {"text": 1.0}, 16, seed=3).batch(start, 4)[0]


CERTAIN = (1.0, 1e-4)  # temperatures: from the middle of the annealing on, one choice of every slot is certain


@pytest.mark.parametrize(
    "settle_steps, dead_zone, temperatures, num_soft",
    [
        (
            2,
            0.9,
            CERTAIN,
            5,
        ),  # the choice has been the same from the first step on; but half of the annealing comes first
        (6, 0.9, CERTAIN, 7),
        (2, 0.0, CERTAIN, 10),  # outside of the dead zone
        (2, 0.9, (1.0, 1.0), 10),  # other choices are nearly as probable
    ],
)
def test_the_router_settles_when_its_choice_is_certain_and_stays_the_same_within_budget(
    data, settle_steps, dead_zone, temperatures, num_soft
):
    routing = Routing(
        learning_rate=1e-9,
        share=1.0,
        scales=(1.0, 1.0),
        candidates=1,
        settle_steps=settle_steps,
        dead_zone=dead_zone,
        temperatures=temperatures,
    )
    run = make_run(data, make_stage(steps=10), routed=True, routing=routing)
    rows = list(train(run))
    assert [row["mode"] for row in rows] == ["soft"] * num_soft + ["hard"] * (10 - num_soft)
    assert set(run.members) == set(BUDGETS)  # at the latest at the end
    assert [set(row["entropy"]) == set(run.router.networks) for row in rows if "entropy" in row] == [True] * num_soft


def test_the_routers_learning_rate_warms_up(data):
    stage = make_stage(steps=8, warmup_steps=4, schedule="constant")
    run = make_run(data, stage, routed=True, routing=Routing(learning_rate=1e-2, share=1.0, candidates=1))
    rates = [run.optimizer.param_groups[-1]["lr"] for _ in train(run)]
    assert rates == pytest.approx([2.5e-3, 5e-3, 7.5e-3, *[1e-2] * 5])


def test_submodels_come_nearer_to_the_teacher(trained):
    run, rows, _ = trained
    input_ids, labels, documents = run.data.batch(5000, 20)
    for budget, share in (("medium", 0.5), ("small", 0.5)):
        submodel, losses = run.members[budget].submodel, []
        with torch.no_grad():
            for model in (run.teacher, run.model):
                _, _, kl = naive_loss(
                    model(input_ids, submodel, None, documents),
                    run.teacher(input_ids, document_ids=documents),
                    labels,
                    Loss(),
                )
                losses.append(kl.item())
        assert losses[1] < share * losses[0], budget
    full = [r["kl"] for row in rows for r in row["microbatches"] if r["budget"] == "full"]
    assert max(full) < 0.3  # what the others learn does not destroy it
    means = [np.mean([r["loss"] for row in part for r in row["microbatches"]]) for part in (rows[:10], rows[-10:])]
    assert means[1] < 0.6 * means[0]


def test_a_family_of_one_learns_from_text(data):
    stage = make_stage(steps=60, loss=TEXT, learning_rate=1e-2, mixture={"text": 1.0})
    rows = list(train(make_run(data, stage, teacher=False, members={"full": MEMBERS["full"]})))
    losses = [np.mean([r["ce"] for r in row["microbatches"]]) for row in rows]
    assert np.mean(losses[-5:]) < 2.7 < math.log(32) < np.mean(losses[:3])  # below what token frequencies give


def test_the_straight_through_mode_trains_router_and_slice(data):
    stage = make_stage(steps=8, gradient_clip=1e9)
    run = make_run(data, stage, routed=True, routing=Routing(mode="hard", share=1.0, candidates=1))
    found, _ = gradients_of_first_step(run)
    assert all(found[f"router.{name}"].abs().sum() > 0 for name, _ in run.router.named_parameters())


# Killed and started again


@pytest.mark.parametrize("killed_after", [4, 7, 11], ids=["soft", "switching", "hard"])
def test_resume_is_bit_identical(data, straight, tmp_path, killed_after):
    reference, rows = straight
    assert [row["mode"] for row in rows] == ["soft"] * 6 + ["hard"] * 6
    first = routed_run(data, tmp_path)
    list(itertools.islice(train(first), killed_after))
    torch.manual_seed(99)
    torch.rand(3)
    second = routed_run(data, tmp_path)
    again = rows_without_time(train(second))
    assert again[0]["step"] == killed_after // 3 * 3 + 1
    assert again == rows[-len(again) :]
    assert_same(second.model.state_dict(), reference.model.state_dict())
    assert_same(second.norms.state_dict(), reference.norms.state_dict())
    assert_same(second.router.state_dict(), reference.router.state_dict())
    assert_same(second.optimizer.state_dict(), reference.optimizer.state_dict())
    assert second.members == reference.members and second.indices == reference.indices
    assert second.comparison == reference.comparison is not None
    third = routed_run(data, tmp_path)
    assert list(train(third)) == [] and third.members == reference.members  # a finished stage stays finished
    assert_same(third.model.state_dict(), reference.model.state_dict())


def test_a_step_whose_row_was_not_taken_is_done_again(data, straight, tmp_path):
    """A full disk refuses the row of a step that also had a checkpoint coming: the metrics must not miss it."""
    with pytest.raises(OSError), contextlib.closing(train(routed_run(data, tmp_path))) as rows:
        for row in rows:
            if row["step"] == 6:
                raise OSError
    with contextlib.closing(train(routed_run(data, tmp_path))) as rows:
        assert rows_without_time(itertools.islice(rows, 4)) == straight[1][3:7]


def test_a_resumed_run_settles_when_it_would_have(data, tmp_path):
    stage = make_stage(checkpoint_every=2, steps=8)
    routing = Routing(1e-9, share=1.0, settle_steps=5, dead_zone=0.9, temperatures=CERTAIN, candidates=4)

    def start(directory):
        return make_run(data, stage, routed=True, routing=routing, checkpoints=directory)

    modes = [row["mode"] for row in train(start(tmp_path / "straight"))]
    assert modes == ["soft"] * 6 + ["hard"] * 2
    list(itertools.islice(train(start(tmp_path / "killed")), 4))
    assert [row["mode"] for row in train(start(tmp_path / "killed"))] == modes[2:]


# Numbers that are none


def poison(model, name="model.norm_f.weight"):
    """Make a weight NaN; returns what heals it."""
    parameter = model.get_parameter(name)
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter[0] = float("nan")

    def heal():
        with torch.no_grad():
            parameter.copy_(before)

    return heal


@pytest.mark.parametrize("routed", [False, True], ids=["hard", "soft"])
def test_a_step_with_a_bad_loss_changes_nothing_and_is_counted(data, routed):
    run = make_run(data, make_stage(), routed, routing=Routing(share=1.0, settle_steps=100))
    rows = train(run)
    next(rows)
    heal = poison(run.model)
    before = snapshot(run.model), copy.deepcopy(run.optimizer.state_dict()["state"])
    bad = [next(rows), next(rows)]
    assert [row["skipped"] for row in bad] == [1, 2] and [row["step"] for row in bad] == [2, 3]
    assert all(math.isnan(budget["loss"]) for budget in bad[0]["budgets"].values())
    after = snapshot(run.model), run.optimizer.state_dict()["state"]
    assert all(torch.equal(after[0][name].nan_to_num(7), value.nan_to_num(7)) for name, value in before[0].items())
    assert_same(after[1], before[1])
    heal()
    good = next(rows)
    assert good["skipped"] == 2 and run.skipped_in_a_row == 0
    assert any(not torch.equal(p, before[0][name]) for name, p in run.model.named_parameters())


@pytest.mark.parametrize("routed", [False, True], ids=["hard", "soft"])
def test_too_many_bad_losses_in_a_row_stop_the_run_and_leave_the_last_checkpoint(data, tmp_path, routed):
    stage = make_stage(max_skipped_steps=2, checkpoint_every=4)
    run = make_run(data, stage, routed, routing=Routing(share=1.0, settle_steps=100), checkpoints=tmp_path)
    rows = train(run)
    for _ in range(5):
        next(rows)
    poison(run.model, "model.layers.2.norm.weight")
    assert [next(rows)["skipped"] for _ in range(2)] == [1, 2]
    with pytest.raises(NonFiniteError) as caught:
        next(rows)
    message = str(caught.value)
    assert re.match(r"step 7, budget (full|medium|small): the loss is nan, first in layer 2 \(\*\): largest", message)
    assert "before it layer 1 (-): largest magnitude" in message
    first = 7 * 6 + 2 * [r["budget"] for r in rows_of(run, 7)].index(message.split("budget ")[1].split(":")[0])
    assert f"Data: samples {first} to {first + 1} (" in message
    assert "Skipped 3 steps in a row, 3 of 8 in all; lower learning_rate" in message
    left = make_run(data, stage, routed, routing=Routing(share=1.0, settle_steps=100), checkpoints=tmp_path)
    resume(left, Checkpoints(tmp_path))
    assert left.step == 4 and all(p.isfinite().all() for p in left.model.parameters())


def rows_of(run, step):
    """The budgets that a step deals."""
    dealt = assign_budgets(dict.fromkeys(run.budgets, 1.0), run.stage.microbatches, run.seed, step)
    return [{"budget": budget} for budget in dealt]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["model.layers.2.mixer.q_proj.weight", "router.networks.ffn.2.bias"])
def test_a_gradient_that_is_not_finite_is_found_where_it_is(data, name, value):
    run = make_run(data, make_stage(max_skipped_steps=0), routed=True)
    model, rows = (run.router if name.startswith("router.") else run.model), train(run)
    next(rows)
    model.get_parameter(name.removeprefix("router.")).register_hook(lambda grad: torch.full_like(grad, value))
    before = snapshot(run.model) | snapshot(run.router)
    place = re.escape(name.removeprefix("router."))
    with pytest.raises(
        NonFiniteError,
        match=rf"^step 1, budgets .*small: the gradient is not finite, first in {place}; its norm by layer: 0: \d",
    ):
        next(rows)
    assert all(torch.equal(p, before[n]) for m in (run.model, run.router) for n, p in m.named_parameters())
