"""Two gloo ranks against one process: the same losses and weights, whatever is sharded, skipped or killed."""

import functools
import math

import pytest
import torch

import tests.support.distributed_cases as cases
import tests.support.ranking_cases as ranking_cases
from elastic_core import rank
from elastic_core.config import ConfigError
from elastic_core.model import architectures
from elastic_core.model.dims import elastic_units
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.distributed.placement import compile_blocks, make_mesh, place
from elastic_core.training.distributed.ranks import Ranks
from tests.support.forked import run_forked
from tests.support.runs import assert_same

# One process adds up the terms of a microbatch in another order than two do: float32 rounding, which grows by step.
LOSS, WEIGHT = 2e-5, 2e-4
# Adam divides by the size of a gradient, so one that is nearly 0 moves a weight by its rounding. With noise of 1e-7 in
# the model's weights, one process alone ends with a router weight that differs by 0.0014.
ROUTER_WEIGHT = 3e-3
# bfloat16 rounds every product to 3 digits; where a sum is rounded differs too.
HALF_LOSS, HALF_WEIGHT = 3e-2, 3e-2
HALF_SCORE = 1e-2  # of units, relative to the largest of a layer
HALF_DEPTH = 3e-2  # of layers
ALONE = Ranks()
ALONE_ALIKE = {"copies": "hard"}  # one process has all weights in any case


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def on_two_ranks(data, out, tmp_path_factory, s3_session):
    """Runs some cases on two ranks; the directory of a case is in `out`."""
    environment = {**s3_session.environment, "TEST_PLACE": f"s3://{s3_session.bucket}/pair"}
    return lambda some: run_forked(cases.run_all, 2, tmp_path_factory.mktemp("ranks"), some, data, out, environment)


@pytest.fixture(scope="module")
def pair(on_two_ranks):
    """Results of the quick cases, by their names."""
    return on_two_ranks(cases.QUICK)


@pytest.fixture(scope="module")
def more(on_two_ranks, out, data):
    """Those of the other cases. What a single process has to prepare for them lies there first."""
    first = cases.start(ALONE, data, checkpoints=out / "from_other_ranks" / "first")
    rows = cases.train(first)
    for _ in range(4):
        next(rows)
    rows.close()
    return on_two_ranks(cases.THOROUGH)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The result of a case in one process, by its name."""

    @functools.cache
    def result(name):
        return getattr(cases, name)(ALONE, data, tmp_path_factory.mktemp(name))

    return result


def assert_alike(pair, single, loss=LOSS, weight=WEIGHT):
    """The same curves, budgets and weights, up to rounding."""
    assert [row["mode"] for row in pair["rows"]] == [row["mode"] for row in single["rows"]]
    for ours, theirs in zip(pair["rows"], single["rows"], strict=True):
        assert [r["budget"] for r in ours["microbatches"]] == [r["budget"] for r in theirs["microbatches"]]
        for one, two in zip(ours["microbatches"], theirs["microbatches"], strict=True):
            assert one.keys() == two.keys()
            for key in ("loss", "ce", "kl", "state", "router_loss"):
                if key in two:
                    assert one[key] == pytest.approx(two[key], rel=loss, abs=loss), (ours["step"], key)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=50 * loss), ours["step"]
        assert ours["tokens"] == theirs["tokens"]
    for name, value in single["weights"].items():
        allowed = max(weight, ROUTER_WEIGHT) if name.startswith("router.") else weight
        assert (pair["weights"][name] - value).abs().max() <= allowed * value.abs().max(), name


@pytest.mark.parametrize("name", ["hard", "soft", "states", "tied_llama", "experts"])
def test_two_ranks_give_the_loss_curve_of_one_process(pair, alone, name):
    assert_alike(pair[name], alone(name))


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["straight_through", "recomputed", "copies", "own_teacher", "states_recomputed"])
def test_more_ways_to_train_give_the_loss_curve_of_one_process(more, alone, name):
    assert_alike(more[name], alone(ALONE_ALIKE.get(name, name)))


@pytest.mark.thorough
def test_recomputation_sharding_and_offloading_change_nothing(pair, more):
    for name in ("recomputed", "copies"):
        assert_alike(more[name], pair["hard"])


def test_bfloat16_matrices_on_two_ranks_learn_like_autocast_on_one(pair, alone):
    assert_alike(pair["half"], alone("half"), HALF_LOSS, HALF_WEIGHT)


@pytest.mark.thorough
def test_states_and_a_soft_step_in_bfloat16_on_two_ranks_are_like_those_on_one(more, alone):
    assert_alike(more["half_states"], alone("half_states"), HALF_LOSS, HALF_WEIGHT)
    first = alone("half_soft") | {"weights": {}}
    assert_alike(more["half_soft"], first, HALF_LOSS)


def test_every_rank_takes_the_same_budget_in_the_same_microbatch(pair):
    result = pair["budgets_of_ranks"]
    first, second = result["seen"]
    assert len(first) == 12 and first == second  # sizes, layers and the router's gates, to the last digit
    assert result["dealt"][0] == result["dealt"][1]
    assert len({layers for _, layers, _ in first}) > 1  # depth does change


@pytest.mark.thorough
def test_a_killed_run_of_two_ranks_ends_at_the_same_bits(more):
    straight, killed = more["resumed"]["straight"], more["resumed"]["killed"]
    assert_same(killed["weights"], straight["weights"])
    assert killed["rows"] == straight["rows"][4:]
    assert [row["mode"] for row in straight["rows"]] == ["soft"] * 4 + ["hard"] * 2


def test_two_ranks_resume_from_s3_to_the_same_bits(pair):
    straight, resumed = pair["hard"], pair["remote"]
    assert resumed["rows"] == straight["rows"][3:]
    assert_same(resumed["weights"], straight["weights"])


@pytest.mark.thorough
def test_two_ranks_go_on_with_a_run_of_one(more, alone):
    single, continued = alone("hard"), more["from_other_ranks"]
    assert [row["step"] for row in continued["rows"]] == list(range(4, 7))
    assert_alike(continued, {**single, "rows": single["rows"][3:]})


@pytest.mark.thorough
def test_one_process_goes_on_with_a_run_of_two_ranks(more, out, data):
    run = cases.routed_run(ALONE, data, out / "resumed" / "killed")
    assert list(cases.train(run)) == []  # it had come to its end
    assert_same(cases.outcome(run, [])["weights"], more["resumed"]["straight"]["weights"])
    assert run.members is not None


def test_a_bad_number_on_one_rank_makes_all_skip_the_step(pair):
    result = pair["poisoned"]
    assert result["skipped"] == 1 and result["unchanged"] and result["next"] == 1
    assert all(math.isfinite(budget["loss"]) for budget in result["loss"].values())


def test_what_is_not_finite_on_one_rank_is_explained_on_all(pair):
    first, second = pair["explained"]["messages"]
    assert first == second
    assert first.startswith("NonFiniteError: step 1, budget full: the loss is nan, first in layer 2 (*)")
    assert "100.0% not finite; before it layer 1 (-): largest magnitude" in first
    assert "Data: samples" in first and "Skipped 2 steps in a row" in first


def test_two_ranks_rank_like_one_process(pair, alone):
    """Each holds half of the matrices. Both methods of both measures; bfloat16 is rounded at the same places."""
    assert pair["ranking"].keys() == alone("ranking").keys()
    for method, expected in alone("ranking").items():
        assert_ranked_alike(pair["ranking"][method], expected)


@pytest.mark.thorough
def test_a_parent_in_bfloat16_files_is_held_so_and_computed_as_asked(more, alone):
    found, expected = more["stored_ranking"], alone("stored_ranking")
    assert_ranked_alike(found, expected)
    assert found["types"] == {"torch.bfloat16"} and expected["types"] == {"torch.float32"}
    assert found["bytes"] <= 0.26 * expected["bytes"]  # a half of the matrices, and half of the bytes


@pytest.mark.thorough
def test_ranks_with_different_padding_rank_like_one_process(more, alone):
    assert_ranked_alike(more["padded_ranking"], alone("padded_ranking"))


def test_bfloat16_ranks_as_float32_does_to_its_rounding(pair):
    """Two units change places only if their scores differ by less than the rounding. Layers keep their order."""
    for config, measure in ((cases.CONFIG, "projection"), (ranking_cases.EXPERTS, "output_norm")):
        ids = torch.randint(0, config.vocab_size, (3, 4, 16), generator=torch.Generator().manual_seed(0))
        exact = rank(cases.random_elastic(3, config), list(ids), measure=measure)
        found = pair["ranking"][f"iterative_nmse {measure} bfloat16"]
        assert found["depth"] == exact.depth
        assert found["depth_scores"] == pytest.approx(exact.depth_scores, rel=HALF_DEPTH)
        for key, scores in exact.scores.items():
            # Of the largest score: a token that goes to another expert changes much in a neuron that is hardly used.
            allowed = HALF_SCORE * scores.max()
            assert ((found["scores"][key] - scores).abs() <= allowed).all(), key
            if key != "hidden":  # of axes
                sorted_scores = scores.gather(-1, found["orders"][key]).unflatten(-1, (groups_of(config, key), -1))
                assert (sorted_scores.diff() <= 2 * allowed).all(), key


def groups_of(config, key):
    return elastic_units(architectures.parameter_layout(config))[key].groups


@pytest.mark.thorough
def test_a_plan_of_a_ranking_counts_what_it_holds(more):
    for planned, real in more["ranking_memory"]:
        assert planned == pytest.approx(real, rel=0.08)


@pytest.mark.thorough
def test_two_ranks_go_on_with_a_stopped_ranking(more, alone):
    found = more["resumed_ranking"]
    assert found["num_saves"] == 9  # stopped after the second, and again after the ninth
    assert_ranked_alike(found, alone("ranking")["iterative_nmse projection float32"])


def assert_ranked_alike(found, expected):
    assert found["depth"] == expected["depth"]
    assert found["depth_scores"] == pytest.approx(expected["depth_scores"], rel=1e-5)
    for key, scores in expected["scores"].items():
        torch.testing.assert_close(found["scores"][key], scores, rtol=1e-5, atol=0)
        assert torch.equal(found["orders"][key], expected["orders"][key]), key
    for key, ratios in expected["norm_ratios"].items():
        torch.testing.assert_close(found["norm_ratios"][key], ratios, rtol=1e-5, atol=0)


def test_shards_are_written_whole_and_read_into_shards(pair):
    result = pair["stored"]
    assert result["same"] and result["frozen"]
    dtypes = result["dtypes"]
    assert dtypes["lm_head.weight"] == dtypes["model.layers.0.mixer.in_proj.weight"] == "torch.bfloat16"
    assert dtypes["model.layers.0.mixer.A_log"] == dtypes["model.norm_f.weight"] == "torch.float32"
    model = cases.random_elastic(5, cases.CONFIG)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    rest = sum(p.numel() for p in model.parameters() if p.dim() != 2)
    assert result["numbers"] <= 0.55 * matrices + rest  # a rank holds its half of the matrices


def test_a_failed_save_is_the_same_error_on_every_rank(pair):
    errors = pair["unwritable"]["errors"]
    assert len(errors) == 2 and all(error.startswith("CheckpointError: the checkpoint of step 0") for error in errors)


def test_an_error_of_rank_0_alone_is_everybodys(pair):
    first, second = pair["told"]["messages"]
    assert first == second and len(first) == 2
    assert first[0].startswith("StorageError: nowhere://bucket/run") and first[1] == "tracking.wandb: got 'x'"


def test_a_disk_that_is_full_for_rank_0_ends_the_stage_on_every_rank(pair, out):
    """And at once, without Ray: the other rank gathers the rest of the model, and is told then."""
    text = "[Errno 28] No space left on device; make space and start again: the run goes on from its last checkpoint"
    assert pair["ended"]["endings"] == [(text, False)] * 2
    assert not (out / "ended" / "model").exists()


def test_what_cannot_be_shared_out_is_refused():
    with pytest.raises(ValueError, match=r"batch_size: got 5; allowed: multiples of the number of workers \(2\)"):
        Ranks(0, 2).part(5)
    with pytest.raises(ConfigError, match=r"shard_over: got 3; allowed: divisors of the number of workers \(4\)"):
        make_mesh(Ranks(0, 4), 3)


@pytest.mark.thorough
def test_compiled_layers_compute_the_same_and_none_falls_back():
    """More shapes than the limit that is set before, the slices' and the full one, each with and without gradients."""
    with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=4, fail_on_recompile_limit_hit=True):
        config = cases.CONFIG.__class__(
            **cases.CONFIG.to_dict() | {"layers_block_type": ["mlp", "attention"], "hidden_size": 16}
        )
        plain, compiled = (cases.random_elastic(0, config) for _ in range(2))
        place(compiled, ALONE, Execution(), "float32")
        compile_blocks(compiled)
        assert torch._dynamo.config.recompile_limit == 64
        for block in compiled.model.layers:  # the graphs are what is tested, not the C++ made of them
            block.norm.compile(dynamic=False, backend="aot_eager")
            block.mixer.compile(dynamic=False, backend="aot_eager")
        ids = torch.randint(0, config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
        for hidden in (16, 12, 8):
            submodel = cases.Submodel(hidden_size=hidden, intermediate_size=hidden)
            for model in (plain, compiled):
                model(ids, submodel).square().mean().backward()
            with torch.no_grad():
                torch.testing.assert_close(compiled(ids, submodel), plain(ids, submodel), rtol=1e-4, atol=1e-5)
        for one, two in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-5)
        compile_blocks(cases.random_elastic(0, cases.CONFIG))
        assert torch._dynamo.config.recompile_limit == 5 * 32  # of five layers
