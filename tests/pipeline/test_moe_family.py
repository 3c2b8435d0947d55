"""A family whose parent has experts: ranked, sorted, trained, measured, served."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, NemotronHConfig, NemotronHForCausalLM

from benchmarks import memory
from elastic_core import ElasticModel, Submodel, extract, rank, sort_
from elastic_core.cost.metrics import ACTIVE_PARAMETERS, exact_cost, num_active_parameters, read_metric
from elastic_core.data.loader import PackedSequences
from elastic_core.export import elastic_checkpoint
from elastic_core.export.nested import NestedModel
from elastic_core.model import architectures
from elastic_core.model.architectures.nemotron_h import layers_of
from elastic_core.search.importance.ranking import Ranking
from elastic_core.search.router import Router
from elastic_core.search.selection import Member
from elastic_core.search.space import ElasticSpace
from elastic_core.training.estimate.flops import pass_flops
from elastic_core.training.loop import train
from elastic_core.training.losses import distillation_loss
from elastic_core.training.run import Run
from elastic_core.training.stage import Loss, Routing
from tasks.commands.inspect import inspect_checkpoint
from tasks.settings.load import read
from tasks.settings.merging import parameters
from tests.support.marks import thorough
from tests.support.models.moe import SEEDS, load
from tests.support.models.moe_family import CHOICES, CONFIG, VALUES
from tests.support.models.parents import random_elastic, random_ids, random_moe_config, random_submodel, relative_error
from tests.support.oracles.flop_counter import counted
from tests.support.oracles.memory_cases import CASES
from tests.support.runs import TEXT, make_stage, measured_on_little_text

LATENT_IN_GROUPS = NemotronHConfig(**VALUES, moe_latent_size=16, n_group=2, topk_group=1, norm_topk_prob=False)


# Importance


@pytest.mark.parametrize("aggregation", ["l1", "l2", "mean"])
@pytest.mark.parametrize("measure", ["projection", "output_norm"])
@pytest.mark.parametrize("config", [CONFIG, LATENT_IN_GROUPS], ids=["plain", "latent"])
def test_scores_equal_the_naive_ones(config, measure, aggregation):
    """Every expert of transformers' model asked by itself, of every token, and weighted with the router's answer."""
    model = random_elastic(3, config)
    reference = NemotronHForCausalLM(config).eval()
    reference.load_state_dict(model.state_dict())
    batches, seen = [random_ids(config, seed) for seed in range(2)], {}
    for i in layers_of(config, "E"):
        hook = lambda mixer, inputs, _, i=i: seen.setdefault(i, []).append((mixer, inputs[0].flatten(0, 1)))  # noqa: E731
        reference.model.layers[i].mixer.register_forward_hook(hook)
    with torch.no_grad():
        for ids in batches:
            reference(ids, use_cache=False)
        ranking = rank(model, batches, measure=measure, aggregation=aggregation, depth_method="one_shot_nmse")
        for i, found in seen.items():
            mixer, x = found[0][0], torch.cat([x for _, x in found])
            _, weights, chosen = mixer.gate(x)
            dense = torch.zeros(len(x), config.n_routed_experts).scatter(1, chosen, weights).double()
            inner = torch.einsum("tc,efc->tef", mixer.fc1_latent_proj(x), mixer.experts.up_proj)
            acted, down = mixer.experts.act_fn(inner), mixer.experts.down_proj
            experts = dense * torch.einsum("tef,ecf->tec", acted, down).norm(dim=-1)
            if measure == "output_norm":
                inner = torch.einsum("tef,ecf->tefc", acted, down).norm(dim=-1)
            neurons = dense[..., None] * inner
            expected = {
                "l1": (experts.sum(0), neurons.abs().sum(0)),
                "l2": (experts.square().sum(0).sqrt(), neurons.square().sum(0).sqrt()),
                "mean": (experts.mean(0), neurons.sum(0).abs() / (len(x) * config.num_experts_per_tok)),
            }[aggregation]
            assert relative_error(ranking.scores[f"experts.{i}"], expected[0]) < 1e-5
            assert relative_error(ranking.scores[f"expert_ffn.{i}"], expected[1]) < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
def test_sorting_changes_nothing_and_puts_the_best_first(tmp_path, seed):
    config = random_moe_config(seed)
    model, batches = random_elastic(seed, config), [random_ids(config, seed + i) for i in range(2)]
    ranking = rank(model, batches, min_depth=2, measure="output_norm")
    ranking.save(tmp_path / "ranking.json")
    with torch.no_grad():
        before = model(batches[0])
        sort_(model, Ranking.load(tmp_path / "ranking.json"))
        assert relative_error(model(batches[0]), before) < 1e-5
    scores = rank(model, batches, min_depth=len(config.layers_block_type), measure="output_norm").scores
    for i in layers_of(config, "E"):
        experts, neurons = scores[f"experts.{i}"].view(config.n_group, -1), scores[f"expert_ffn.{i}"]
        for row in (*experts, *neurons):  # every group's experts, every expert's neurons
            assert torch.all(row.diff() <= 1e-5 * row.max())
    orders = dict(ranking.orders)
    key = f"expert_ffn.{layers_of(config, 'E')[0]}"
    orders[key] = orders[key][:-1]
    with pytest.raises(ValueError, match=rf"the order of '{key}' is not a permutation"):
        sort_(model, dataclasses.replace(ranking, orders=orders))


# Training


@pytest.mark.parametrize("config", [CONFIG, LATENT_IN_GROUPS], ids=["plain", "latent"])
def test_gradients_of_gates_are_finite_differences(config):
    """Of every axis of mixtures, where gates are fractions: between two changes of who is chosen."""
    model, ids = random_elastic(4, config).double(), random_ids(config, 4, (1, 7))
    generator = torch.Generator().manual_seed(4)
    gates = {
        key: (0.4 + 0.6 * torch.rand(units.size, generator=generator, dtype=torch.float64)).requires_grad_()
        for key, units in architectures.units(config).items()
    }
    signs = torch.randn(1, 7, 32, generator=generator, dtype=torch.float64)

    def loss(gates):
        return (model(ids, gates=gates) * signs).sum()

    keys = [key for key in gates if "expert" in key or "shared" in key or key == "hidden"]
    gradients = torch.autograd.grad(loss(gates), [gates[key] for key in keys])
    for key, gradient in zip(keys, gradients, strict=True):
        direction, step = torch.randn(gates[key].shape, generator=generator, dtype=torch.float64), 1e-6
        with torch.no_grad():
            up, down = (loss(gates | {key: gates[key] + sign * step * direction}) for sign in (1, -1))
        expected = (up - down) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(expected.item(), rel=1e-5), key
        assert gradient.abs().max() > 0


def test_hard_gates_have_a_gradient_although_weights_add_up_to_one():
    """Straight-through: their value is 1, and what they would scale is what experts say."""
    model, ids = random_elastic(5, CONFIG), random_ids(CONFIG, 5)
    submodel = random_submodel(CONFIG, 5, all_layers=True)
    gates = {key: torch.ones((), requires_grad=True) for key in architectures.units(CONFIG) if key.startswith("exp")}
    logits = model(ids, submodel, gates)
    assert torch.equal(logits, model(ids, submodel))
    logits.square().sum().backward()
    assert all(gate.grad.abs() > 0 for gate in gates.values())


def make_run(data, stage, budgets, metric, mode):
    model = random_elastic(0, CONFIG)
    ranking = rank(model, [random_ids(CONFIG, seed) for seed in range(2)])
    sort_(model, ranking)
    torch.manual_seed(0)
    router = Router(ElasticSpace(CONFIG, CHOICES, ranking.depth, metric=metric), tuple(budgets.values()))
    sequences = PackedSequences(data, stage.mixture, stage.sequence_length, seed=1)
    return Run(model, stage, sequences, budgets, router=router, routing=Routing(mode=mode, share=0.5, candidates=4))


@pytest.mark.parametrize(
    "mode, precision",
    [("soft", "bfloat16"), ("hard", "float32"), thorough("soft", "float32"), thorough("hard", "bfloat16")],
)
def test_a_family_of_experts_learns_and_ships(data, tmp_path, mode, precision):
    """The router cuts active parameters; what it chose is extracted, loaded by transformers, and computes the same."""
    budgets = {"full": 1.0, "small": 0.7}
    stage = make_stage(
        steps=40, loss=TEXT, loss_by_budget={"small": Loss(1.0, 0.0)}, precision=precision, microbatches=2
    )
    run = make_run(data, stage, budgets, ACTIVE_PARAMETERS, mode)
    with measured_on_little_text():
        rows = list(train(run))
    assert {row["mode"] for row in rows} == {"soft", "hard"} and run.skipped == 0
    first, last = (
        sum(row["budgets"][name]["loss"] for row in part for name in budgets) for part in (rows[:4], rows[-4:])
    )
    assert last < 0.8 * first
    small, full = run.members["small"].submodel, exact_cost(ACTIVE_PARAMETERS, CONFIG)
    assert exact_cost(ACTIVE_PARAMETERS, CONFIG, small) == pytest.approx(0.7 * full, rel=0.02)
    run.model.save_pretrained(tmp_path / "family")
    elastic_checkpoint.write(tmp_path / "family", CONFIG, run.members, [], ACTIVE_PARAMETERS)
    content = json.loads((tmp_path / "family" / "elastic.json").read_text())
    assert read_metric(content["cost"]) == ACTIVE_PARAMETERS and content["parent_num_active_parameters"] == full
    described = inspect_checkpoint(tmp_path / "family")
    assert described["active_parameters"] == full
    for values in (
        content["budgets"]["small"]["num_active_parameters"],
        described["budgets"]["small"]["active_parameters"],
    ):
        assert values == num_active_parameters(CONFIG, small) == exact_cost(ACTIVE_PARAMETERS, CONFIG, small)
    assert elastic_checkpoint.find_submodel(tmp_path / "family", float(round(0.7 * full))) == small
    extract(tmp_path / "family", "small", tmp_path / "small")
    ids = random_ids(CONFIG, 1)
    with torch.no_grad():
        expected = load(tmp_path / "small")(ids, use_cache=False).logits
        assert relative_error(run.model(ids, small), expected) < 1e-5
        for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
            expected = load(tmp_path / "small", dtype)(ids, use_cache=False).logits
            grouped = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=dtype)  # as it is by default
            assert relative_error(grouped(ids, use_cache=False).logits, expected) < error


def test_autocast_routes_in_float32():
    """The same experts as without, where all else is rounded."""
    config = NemotronHConfig(**VALUES | {"layers_block_type": NemotronHConfig._pattern_to_list("E")})
    model, x = random_elastic(6, config), torch.randn(50, 32).bfloat16().float()
    mixer, sliced = model.model.layers[0].mixer, model.slice()
    chosen, weights = mixer._route(x, sliced)
    with torch.autocast("cpu", torch.bfloat16):
        low_chosen, low_weights = mixer._route(x.bfloat16(), sliced)
        y = mixer(x[None].bfloat16(), sliced)
    assert torch.equal(low_chosen, chosen) and torch.equal(low_weights, weights) and y.dtype == torch.bfloat16
    assert relative_error(y.float(), mixer(x[None], sliced)) < 0.02


# What it takes


@pytest.mark.parametrize("seed", SEEDS)
def test_operations_are_those_of_the_experts_that_are_asked(seed):
    config = random_moe_config(seed)
    model, ids = random_elastic(seed, config), random_ids(config, seed, (2, 21))
    submodel = random_submodel(config, seed)
    sliced = model.slice(submodel)
    hidden, trunk = counted(lambda: model.hidden_states(ids, sliced))
    loss, head = counted(lambda: distillation_loss(hidden, model.head(sliced), ids, None, 1.0, 0.0)[0])
    _, backward = counted(loss.backward)
    flops = pass_flops(config, 21, submodel) * 2
    gradients_of_head = 2 * head // 3
    assert (flops.forward, flops.backward) == (trunk + head - gradients_of_head, backward + gradients_of_head)


@pytest.mark.parametrize("case, latent", [("plain", 32), ("sharded", None)])
def test_real_steps_take_the_memory_that_is_predicted(case, latent):
    """Predicted with tokens spread evenly over the experts, measured with a router that is drawn at random."""
    larger = {"vocab_size": 512, "hidden_size": 64, "moe_intermediate_size": 48, "moe_latent_size": latent}
    larger["layers_block_type"] = ["linear_attention", "moe"]
    choices = {"depth": "[2,1]", "num_experts": "[8,6,4]", "moe_intermediate_size": "[48,32,16]"}
    names = ("hidden_size", "intermediate_size", "mamba_num_heads", "mamba_head_dim", "num_attention_heads")
    overrides = [f"choices.{name}=null" for name in names] + [f"choices.{n}={v}" for n, v in choices.items()]
    overrides += ["budgets.medium=0.8", "budgets.small=0.6", "train_short.batch_size=4", "train_extended.batch_size=2"]
    settings = read(parameters(overrides=[*overrides, *CASES[case]]), "params.yaml")
    for name, peak, real in memory.compare(settings, NemotronHConfig(**VALUES | larger)):
        # What sharding holds of a block that is so large a part of the model is an upper estimate.
        assert 0.92 < peak.total / real < (1.15 if case == "sharded" else 1.08), (name, peak, real)


# Many in one


@pytest.mark.parametrize("config", [CONFIG, LATENT_IN_GROUPS], ids=["plain", "latent"])
def test_every_budget_of_one_set_of_weights_is_its_extracted_model(tmp_path, config):
    random_elastic(7, config).save_pretrained(tmp_path / "family")
    small = Submodel(24, (0, 1, 2, 3), num_experts=4, moe_intermediate_size=8, moe_shared_expert_intermediate_size=12)
    smaller = dataclasses.replace(small, hidden_size=20, kept_layers=(0, 2, 3))
    members = {name: Member(1.0, s.resolve(config)) for name, s in (("small", small), ("smaller", smaller))}
    elastic_checkpoint.write(tmp_path / "family", config, members, [])
    model, ids = NestedModel.from_pretrained(tmp_path / "family"), random_ids(config, 7)
    for name in members:
        extract(tmp_path / "family", name, tmp_path / name)
        with torch.no_grad():
            expected = load(tmp_path / name)(ids).logits
            assert relative_error(model.at(name)(ids).logits, expected) < 1e-5
            assert relative_error(ElasticModel.from_pretrained(tmp_path / name)(ids), expected) < 1e-5
    talk = model.conversation()
    talk.say(ids[:1])
    talk.generate("small", max_new_tokens=3, do_sample=False)
    talk.generate("smaller", hand_over=True, max_new_tokens=3, do_sample=False)
    assert talk.input_ids.shape == (1, 21 + 6)
