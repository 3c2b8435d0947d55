"""Stages: whose turn it is, how fast to learn, and which losses count."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from elastic_core.config import ConfigError, load
from elastic_core.training.stage import Loss, Routing, Stage, assign_budgets, uses_trainable_teacher

VALUES = {"sequence_length": 8, "batch_size": 12, "steps": 100, "learning_rate": 0.01, "mixture": {"prose": 1.0}}


def make_stage(**values):
    return load(Stage, VALUES | values, "stage")


@pytest.mark.parametrize("microbatches", [1, 3, 4, 16])
@pytest.mark.parametrize("shares", [{"a": 1, "b": 1, "c": 1}, {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 5, "b": 0, "c": 1}])
def test_dealing_keeps_the_shares_in_every_window(microbatches, shares):
    dealt = [assign_budgets(shares, microbatches, seed=7, step=step) for step in range(400)]
    assert all(len(step) == microbatches for step in dealt)
    total = sum(shares.values())
    for first, last in [(0, 400), (0, 100), (37, 137), (250, 290), (123, 133)]:
        counts = Counter(budget for step in dealt[first:last] for budget in step)
        for budget, share in shares.items():
            assert abs(counts[budget] - share / total * (last - first) * microbatches) <= 3, (budget, first, last)
        assert set(counts) == {budget for budget in shares if shares[budget]}


def test_dealing_is_stratified_inside_a_step():
    shares = {"a": 0.5, "b": 0.25, "c": 0.25}
    for step in range(50):
        assert Counter(assign_budgets(shares, 8, 0, step)) == {"a": 4, "b": 2, "c": 2}  # exact, where shares allow it


def test_dealing_is_a_function_of_seed_and_step_alone():
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    np.random.seed(0)
    first = [assign_budgets(shares, 4, 1, step) for step in range(30)]
    np.random.seed(1)
    assert [assign_budgets(shares, 4, 1, step) for step in reversed(range(30))] == first[::-1]
    assert [assign_budgets(shares, 4, 2, step) for step in range(30)] != first
    assert len({tuple(step) for step in first}) > 5  # places inside a step are shuffled


def test_every_sequence_is_read_once():
    stage = make_stage(microbatches=6)  # two sequences a microbatch
    assert [stage.first_sample(step, i) for step in range(2) for i in range(6)] == list(range(0, 24, 2))


def test_learning_rate_end_points():
    for schedule in ("constant", "linear", "cosine"):
        stage = make_stage(warmup_steps=10, schedule=schedule, final_learning_rate=0.2)
        rates = [stage.learning_rate_factor(step) for step in range(101)]
        assert rates[0] == pytest.approx(0.1) and rates[4] == pytest.approx(0.5)
        assert rates[9] == rates[10] == pytest.approx(1.0)
        assert rates[100] == pytest.approx(1.0 if schedule == "constant" else 0.2)  # one past the last step
        assert rates[55] == pytest.approx(1.0 if schedule == "constant" else 0.6)  # half way
        assert sorted(rates[10:], reverse=True) == rates[10:]
    assert make_stage(warmup_steps=0).learning_rate_factor(0) == 1.0
    short = make_stage(warmup_steps=200)  # longer than the stage: it only warms up
    assert short.learning_rate_factor(99) == pytest.approx(0.5)


def test_losses_may_differ_by_budget():
    stage = make_stage(
        loss={"kl_weight": 0.5, "temperature": 2.0},
        loss_by_budget={"full": {"ce_weight": 1.0, "kl_weight": 0.0}},
    )
    assert stage.loss_of("full") == Loss(1.0, 0.0, 1.0)  # an override stands by itself
    assert stage.loss_of("small") == Loss(0.0, 0.5, 2.0)


def test_num_tokens():
    stage = make_stage()
    assert stage.num_tokens() == 100 * 12 * 8 and stage.num_tokens(3) == 3 * 12 * 8


def turns_of_teachers(stage, shares, seed):
    """(budgets, whether each has the trainable teacher), both (steps, microbatches)."""
    steps, microbatches = range(stage.steps), range(stage.microbatches)
    budgets = np.array([assign_budgets(shares, stage.microbatches, seed, step) for step in steps])
    own = [[uses_trainable_teacher(stage, shares, seed, step, m) for m in microbatches] for step in steps]
    return budgets, np.array(own)


@pytest.mark.parametrize("microbatches", [1, 2, 3, 4])
@pytest.mark.parametrize("shares", [{"a": 1, "b": 1, "c": 1}, {"a": 0.2, "b": 0.4, "c": 0.4}, {"a": 5, "b": 0, "c": 1}])
def test_mixed_teachers_move_linearly_for_every_budget_alike(microbatches, shares):
    """In any window of steps, the number of turns is the scheduled one but for less than two."""
    stage = make_stage(teacher="mixed", microbatches=microbatches, batch_size=12, steps=600)
    for seed in (0, 7):
        budgets, own = turns_of_teachers(stage, shares, seed)
        assert not own[0].any()
        scheduled = np.broadcast_to(np.arange(600)[:, None] / 600, own.shape)
        for first, last in [(0, 600), (0, 100), (37, 137), (250, 290), (300, 312), (560, 600)]:
            for budget in (name for name, share in shares.items() if share):
                turns = budgets[first:last] == budget
                expected = (scheduled[first:last] * turns).sum()
                assert abs((own[first:last] & turns).sum() - expected) < 2, (budget, first, last)


def test_turns_of_teachers_depend_on_seed_and_step_alone():
    stage, shares = make_stage(teacher="mixed", microbatches=3), {"a": 0.5, "b": 0.3, "c": 0.2}
    np.random.seed(0)
    first = turns_of_teachers(stage, shares, 1)[1].tolist()
    np.random.seed(1)
    assert turns_of_teachers(stage, shares, 1)[1].tolist() == first != turns_of_teachers(stage, shares, 2)[1].tolist()
    for teacher in ("frozen", "trainable"):
        _, own = turns_of_teachers(make_stage(teacher=teacher), shares, 0)
        assert np.unique(own).tolist() == [teacher == "trainable"]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"steps": 0}, r"stage\.steps: got 0; allowed: 1 or more"),
        ({"sequence_length": -1}, r"stage\.sequence_length: got -1"),
        ({"checkpoint_every": 0}, r"stage\.checkpoint_every: got 0"),
        ({"keep_checkpoints": 0}, r"stage\.keep_checkpoints: got 0"),
        ({"microbatches": 5}, r"stage\.batch_size: got 12; allowed: a multiple of microbatches \(5\)"),
        ({"learning_rate": 0.0}, r"stage\.learning_rate: got 0\.0; allowed: above 0"),
        ({"warmup_steps": -1}, r"stage\.warmup_steps: got -1"),
        ({"final_learning_rate": 1.5}, r"stage\.final_learning_rate: got 1\.5; allowed: 0 to 1 of the peak"),
        ({"gradient_clip": 0.0}, r"stage\.gradient_clip: got 0\.0"),
        ({"betas": [0.9]}, r"stage\.betas: got \(0\.9,\); allowed: two numbers"),
        ({"schedule": "step"}, r"stage\.schedule: got 'step'; allowed: 'constant', 'linear', 'cosine'"),
        ({"precision": "float16"}, r"stage\.precision: got 'float16'; allowed: 'float32', 'bfloat16'"),
        ({"teacher": "none"}, r"stage\.teacher: got 'none'; allowed: 'frozen', 'trainable', 'mixed'"),
        ({"mixture": {"prose": -1.0}}, r"stage\.mixture: got .*shares of 0 or more"),
        ({"budget_shares": {"a": 0.0}}, r"stage\.budget_shares: got .*not all 0"),
        ({"loss": {"ce_weight": 0.0, "kl_weight": 0.0}}, r"stage\.loss\.kl_weight: .*one weight above 0"),
        ({"loss": {"state_weight": -1.0}}, r"stage\.loss\.state_weight: got -1\.0; allowed: 0 or more"),
        ({"loss": {"ce_weight": -1.0}}, r"stage\.loss\.ce_weight: got -1\.0; allowed: 0 or more"),
        ({"loss_by_budget": {"a": {"temperature": 0.0}}}, r"stage\.loss_by_budget\.a\.temperature: got 0\.0"),
        ({"loss_by_budget": {"a": {"temprature": 1.0}}}, r"loss_by_budget\.a\.temprature: unknown .*'temperature'"),
    ],
)
def test_stages_say_what_is_wrong(values, words):
    with pytest.raises(ConfigError, match=words):
        make_stage(**values)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"learning_rate": 0.0}, r"routing\.learning_rate"),
        ({"share": 0.0}, r"routing\.share: got 0\.0; allowed: above 0, up to 1"),
        ({"share": 1.1}, r"routing\.share"),
        ({"temperatures": [1.0]}, r"routing\.temperatures: got \(1\.0,\); allowed: \[from, to\]"),
        ({"temperatures": [1.0, 0.0]}, r"routing\.temperatures: .*above 0"),
        ({"scales": [0.0, 1.0]}, r"routing\.scales: .*above 0"),
        ({"dead_zone": 1.0}, r"routing\.dead_zone"),
        ({"settle_steps": 0}, r"routing\.settle_steps"),
        ({"candidates": 0}, r"routing\.candidates: got 0; allowed: 1 or more"),
        ({"mode": "firm"}, r"routing\.mode: got 'firm'; allowed: 'soft', 'hard'"),
    ],
)
def test_routing_says_what_is_wrong(values, words):
    with pytest.raises(ConfigError, match=words):
        load(Routing, values, "routing")


def test_defaults_are_valid():
    for section in (Routing(), Loss(), make_stage()):
        section.check()
        assert dataclasses.is_dataclass(section)
