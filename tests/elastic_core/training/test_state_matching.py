"""Matching of states against plain autograd; when it applies; that it holds little memory."""

import copy
import dataclasses

import pytest
import torch

from elastic_core import Submodel
from elastic_core.data.loader import IGNORED_LABEL, PackedSequences
from elastic_core.model import architectures
from elastic_core.model.documents import documents_of
from elastic_core.search.selection import Member
from elastic_core.training import loop
from elastic_core.training.estimate.live_bytes import LiveBytes
from elastic_core.training.loop import train
from elastic_core.training.run import Run
from elastic_core.training.stage import Loss, Routing
from elastic_core.training.state_matching import state_loss
from tests.support.models.parents import random_elastic, random_llama_config, relative_error
from tests.support.models.routed_family import CONFIG
from tests.support.oracles.flop_counter import counted
from tests.support.runs import BUDGETS, MEMBERS, TEXT, assert_same, make_run, make_stage, rows_without_time

pytestmark = pytest.mark.usefixtures("little_text")
EPS = 1e-5
MATCHED = Loss(state_weight=0.3)


def draw(seed, tokens=23, width=7, dtype=torch.float64):
    """States, a teacher's states, and weights of which some are 0."""
    generator = torch.Generator().manual_seed(seed)
    states, target = (torch.randn(2, tokens, width, generator=generator, dtype=torch.float64) * 3).to(dtype)
    weights = torch.rand(tokens, generator=generator, dtype=torch.float64)
    weights[::4] = 0
    return states.requires_grad_(), target, weights


def naive(states, target, weights, eps=EPS):
    """The same loss by torch's own functions."""
    size = states.shape[-1:]
    normed = [torch.nn.functional.rms_norm(x, size, eps=eps) for x in (states, target)]
    return (weights * (normed[0] - normed[1]).square().mean(-1)).sum()


@pytest.mark.parametrize("width", [1, 7, 12])
@pytest.mark.parametrize("chunk", [1, 5, 23, None])
def test_value_and_gradient(chunk, width):
    states, target, weights = draw(0, width=width)
    expected = naive(states, target, weights)
    loss = state_loss(states, target.clone(), weights, EPS, chunk)
    assert loss.dtype == torch.float64 and abs(loss - expected) < 1e-10
    (gradient,), (correct,) = (torch.autograd.grad(3 * value, states) for value in (loss, expected))
    assert (gradient - correct).abs().max() < 1e-10 and not gradient[::4].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_lower_precision(dtype, tolerance):
    states, target, weights = draw(1, dtype=dtype)
    wide = states.detach().double().requires_grad_()
    expected = naive(wide, target.double(), weights)
    loss = state_loss(states, target, weights, EPS, 5)
    assert loss.dtype == torch.float32 and abs(loss / expected - 1) < 1e-5  # computed in float32
    (gradient,), (correct,) = torch.autograd.grad(loss, states), torch.autograd.grad(expected, wide)
    assert gradient.dtype == dtype and relative_error(gradient.double(), correct) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_states_have_no_loss_and_no_gradient(dtype):
    states, _, weights = draw(2, dtype=dtype)
    loss = state_loss(states, states.detach().clone(), weights, EPS)
    assert loss == 0 and not torch.autograd.grad(loss, states)[0].any()
    scaled = state_loss(states, 4 * states.detach(), weights, 0.0)  # scale does not count
    assert scaled == 0
    zero = torch.zeros_like(states).requires_grad_()
    assert torch.autograd.grad(state_loss(zero, states.detach().clone(), weights, EPS), zero)[0].isfinite().all()


def test_the_gradient_takes_the_place_of_the_target():
    tokens, width, chunk = 4096, 16, 64
    states, target, weights = draw(3, tokens, width, torch.bfloat16)
    with LiveBytes() as live:
        loss = state_loss(states, target, weights, EPS, chunk)
    assert live.peak < 8 * 4 * chunk * width + 16 * tokens < 2 * tokens * width * 2
    assert live.now < 16 * tokens
    assert torch.equal(torch.autograd.grad(loss, states)[0], target)


def test_it_counts_no_matrix_product():
    states, target, weights = draw(4)
    loss, forward = counted(lambda: state_loss(states, target, weights, EPS))
    _, backward = counted(loss.backward)
    assert forward == backward == 0


# In a training run

ODD = Submodel(13, (0, 2, 3), (9, 9), 4, 5, 4).resolve(CONFIG)
FAMILY = MEMBERS | {"small": Member(0.45, ODD)}


def states_after_layers(model, *arguments):
    """The outputs of the layers that a forward pass of `model` runs, by layer."""
    found = {}

    def remember(layer):
        return lambda module, inputs, output: found.update({layer: output})

    handles = [block.register_forward_hook(remember(i)) for i, block in enumerate(model.model.layers)]
    model.hidden_states(*arguments)
    for handle in handles:
        handle.remove()
    return found


def naive_matching(model, teacher, submodel, batch, num_labelled):
    """The mean over the layers of `submodel` of the naive loss."""
    documents = documents_of(batch.document_ids, batch.input_ids)
    ours = states_after_layers(model, batch.input_ids, model.slice(submodel), documents)
    with torch.no_grad():
        theirs = states_after_layers(teacher, batch.input_ids, teacher.slice(), documents)
    assert tuple(ours) == submodel.kept_layers
    weights, eps = (batch.labels != IGNORED_LABEL) / num_labelled.double(), architectures.of(CONFIG).norm_eps(CONFIG)
    return sum(naive(x, theirs[i][..., : x.shape[-1]], weights, eps) for i, x in ours.items()) / len(ours)


@pytest.mark.parametrize("teacher", ["frozen", "trainable"])
def test_gradient_of_a_whole_step_is_that_of_plain_autograd(data, teacher):
    """With several documents in a row, padding, and a submodel of odd sizes. From text and states, in float64."""
    stage = make_stage(teacher=teacher, loss=Loss(1.0, 0.0, state_weight=0.7), gradient_clip=1e9)
    run = Run(
        random_elastic(0, CONFIG).double(),
        stage,
        PackedSequences(data, stage.mixture, stage.sequence_length, seed=1),
        BUDGETS,
        members=FAMILY,
        teacher=random_elastic(7, CONFIG).double() if teacher == "frozen" else None,
    )
    plain = copy.deepcopy(run.model)
    found = {}
    run.optimizer.register_step_pre_hook(
        lambda *_: found.update({name: p.grad.clone() for name, p in run.model.named_parameters()})
    )
    batches = [loop.microbatch_data(run, i) for i in range(3)]
    row = next(train(run))
    assert {part["budget"] for part in row["microbatches"]} == set(BUDGETS)
    for part, batch in zip(row["microbatches"], batches, strict=True):
        count, submodel = (batch.labels != IGNORED_LABEL).sum(), FAMILY[part["budget"]].submodel
        logits = plain(batch.input_ids, submodel, document_ids=batch.document_ids)
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        assert part["kl"] == 0  # no logits of the teacher are needed
        if teacher == "trainable" and part["budget"] == "full":
            assert "state" not in part and "state" not in row["budgets"]["full"]
        else:
            expected = naive_matching(plain, run.teacher or plain, submodel, batch, count)
            assert expected > 1e-3
            assert part["state"] == row["budgets"][part["budget"]]["state"] == pytest.approx(expected.item(), abs=1e-10)
            total = total + 0.7 * expected
        assert part["loss"] == part["total"] == pytest.approx(total.item(), abs=1e-10)
        (total / 3).backward()
    for name, parameter in plain.named_parameters():
        assert (found[name] - parameter.grad).abs().max() < 1e-10, name


def test_full_budget_has_nothing_to_learn_from_its_own_copy(data):
    row = next(train(make_run(data, make_stage(loss=MATCHED), members={"full": MEMBERS["full"]})))
    assert row["grad_norm"] == 0 and all(part["state"] == 0 for part in row["microbatches"])


def routed(data, directory, mode="soft"):
    """A run whose router learns for 4 of 8 steps. The full budget does not match states."""
    stage = make_stage(steps=8, loss=MATCHED, loss_by_budget={"full": Loss()}, checkpoint_every=3)
    routing = Routing(share=0.5, settle_steps=100, mode=mode, candidates=4)
    return make_run(data, stage, routed=True, routing=routing, checkpoints=directory)


def test_states_are_matched_once_the_family_is_settled(data):
    for mode in ("soft", "hard"):
        for row in train(routed(data, None, mode)):
            settled = row["mode"] == "hard"
            assert all(("state" in p) == (settled and p["budget"] != "full") for p in row["microbatches"])
            assert all(("state" in values) == (settled and name != "full") for name, values in row["budgets"].items())


def test_a_killed_run_ends_with_the_same_bits(data, tmp_path):
    straight = routed(data, tmp_path / "straight")
    rows = rows_without_time(train(straight))
    killed = train(routed(data, tmp_path / "killed"))
    for _ in range(7):  # one after the checkpoint of step 6
        next(killed)
    killed.close()
    resumed = routed(data, tmp_path / "killed")
    assert rows_without_time(train(resumed)) == rows[6:]
    assert_same(dict(resumed.model.named_parameters()), dict(straight.model.named_parameters()))


def test_without_a_weight_nothing_is_matched(data, monkeypatch):
    monkeypatch.delattr(loop, "StateMatching")
    run, seen = make_run(data, make_stage()), []
    for model in (run.model, run.teacher):
        model.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[3]))
    row = next(train(run))
    assert seen == [None] * 6 and not any("state" in part for part in [*row["microbatches"], *row["budgets"].values()])


def test_a_teacher_is_run_where_it_is_needed(data):
    """Not for states that are not matched yet."""
    stage = make_stage(loss=Loss(1.0, 0.0, state_weight=0.3), steps=8)
    run, passes = make_run(data, stage, routed=True, routing=Routing(share=0.5, settle_steps=100, candidates=1)), []
    run.teacher.model.register_forward_hook(lambda *_: passes.append(run.step))
    rows = list(train(run))
    assert [row["mode"] for row in rows] == ["soft"] * 4 + ["hard"] * 4 and min(passes) == 4 and len(passes) == 12


def test_teachers_that_do_not_fit_are_refused(data):
    only_states = make_stage(loss=Loss(1.0, 0.0, state_weight=0.3))
    with pytest.raises(ValueError, match=r"loss\.state_weight: got 0\.3 for budget full, but no model for the frozen"):
        make_run(data, only_states, teacher=False)
    run = make_run(data, make_stage(loss=MATCHED))
    wider = random_elastic(0, type(CONFIG)(**CONFIG.to_dict() | {"hidden_size": 24}))
    other = random_llama_config(0)
    other.vocab_size = CONFIG.vocab_size
    for teacher, words in ((wider, r"is \(32, 24\) and not \(32, 16\)"), (random_elastic(0, other), "missing")):
        with pytest.raises(ValueError, match=rf"state_weight: got 0\.3, but the teacher has other shapes .*{words}"):
            dataclasses.replace(run, teacher=teacher)
        dataclasses.replace(run, stage=make_stage(), teacher=teacher)  # KL needs no equal shapes
    unused = make_stage(loss=TEXT, budget_shares={"small": 1.0}, loss_by_budget={"full": MATCHED})
    make_run(data, unused, teacher=False)
