"""Training under a budget in bytes: the family lands on it, and what is cut is what memory is made of."""

import dataclasses
import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

from elastic_core import extract
from elastic_core.cost.budgets import Cost
from elastic_core.cost.memory import Memory
from elastic_core.cost.metrics import PARAMETERS, exact_cost, memory_parts, num_parameters
from elastic_core.cost.targets import family_metric
from elastic_core.export import elastic_checkpoint
from elastic_core.model.architectures.nemotron_h import layers_of
from elastic_core.search.path import path_between
from tasks.evaluation import latency_and_memory
from tests.support.marks import thorough
from tests.support.models.budgeted_family import CONFIG, train_family
from tests.support.models.parents import random_ids

FULL = num_parameters(CONFIG)
SHARE = 0.62  # of the parent, in every metric
LONG = Cost(metric="memory", chunk=1)  # of one token: a step of decoding
MANY = Cost(metric="memory", context=8, weights="fp8", chunk=1)


@pytest.fixture(scope="module")
def family_of(data):
    """At the same share of the parent: a long text in little room, many short ones, and parameters."""
    long, many = (exact_cost(metric, CONFIG) for metric in (Memory(512, chunk=1), Memory(8, 64, "fp8", chunk=1)))
    asked = {
        "long": (SHARE * long, LONG, f"{SHARE * long / 2**10:.3f}KiB@512"),
        "many": (SHARE * many, MANY, f"{SHARE * many / 2**20:.6f}MiB@8×64"),
        "parameters": (SHARE * FULL, Cost(), SHARE),
    }

    @functools.cache
    def family(name: str):
        target, cost, small = asked[name]
        budgets = {"full": 1.0, "small": small}
        return target, *train_family(data, family_metric(cost, budgets), budgets)

    return family


@pytest.fixture(scope="module")
def families(family_of):
    return {name: family_of(name) for name in ("long", "many", "parameters")}


@pytest.mark.parametrize("name", ["long", thorough("many"), thorough("parameters")])
def test_a_family_lands_on_its_budget(family_of, name):
    asked, run, rows = family_of(name)
    small = run.members["small"].submodel
    assert abs(exact_cost(run.metric, CONFIG, small) / asked - 1) <= 0.02
    assert run.members["full"].submodel == run.model.full and run.members["small"].target == pytest.approx(SHARE, 1e-4)
    assert {row["mode"] for row in rows} == {"soft", "hard"}
    errors = [row["budgets"]["small"]["budget_error"] for row in rows if "small" in row["budgets"]]
    assert (
        errors[-1] == pytest.approx(abs(exact_cost(run.metric, CONFIG, small) / asked - 1), abs=1e-4)
        and errors[-1] < 0.02
    )


@pytest.mark.thorough
def test_routers_learn_to_keep_their_budgets(families):
    """Together: one alone may be held elsewhere by the loss of the texts."""
    first = last = 0.0
    for _, _, rows in families.values():
        soft = [r for row in rows if row["mode"] == "soft" for r in row["microbatches"] if r["budget"] == "small"]
        first += sum(r["router_loss"] for r in soft[:5])
        last += sum(r["router_loss"] for r in soft[-5:])
    assert last < 0.5 * first


@pytest.mark.thorough
def test_what_is_cut_is_what_memory_is_made_of(families):
    smalls = {name: run.members["small"].submodel for name, (_, run, _) in families.items()}
    attention = {name: set(layers_of(CONFIG, "*")) & set(small.kept_layers) for name, small in smalls.items()}
    inner = {name: small.mamba_num_heads * small.mamba_head_dim for name, small in smalls.items()}
    counts = {name: num_parameters(CONFIG, small) / FULL for name, small in smalls.items()}
    # Half of the cache goes with a layer of attention, and then there is room for most of the parameters.
    assert len(attention["long"]) == 1 and counts["long"] > 0.75
    # States are as large as heads × channels; keys and values of eight tokens are nothing.
    assert inner["many"] <= 0.7 * 24 < inner["long"]
    assert counts["parameters"] == pytest.approx(SHARE, rel=0.02)
    asked, run, _ = families["many"]
    assert exact_cost(run.metric, CONFIG, smalls["long"]) > 1.2 * asked  # what serves one text does not serve many


def test_its_checkpoint_serves_budgets_of_every_kind(family_of, tmp_path):
    """By name and share of memory, by bytes in this and another setting, and by parameters, all from one family."""
    _, run, _ = family_of("long")
    directory, metric = tmp_path / "family", run.metric
    run.model.save_pretrained(directory)
    path = path_between(run.router.space, run.indices)
    elastic_checkpoint.write(directory, CONFIG, run.members, path, metric)
    assert elastic_checkpoint.read(directory)["cost"] == {"metric": "memory", **dataclasses.asdict(metric)}
    small, full = run.members["small"].submodel, exact_cost(metric, CONFIG)
    asked = exact_cost(metric, CONFIG, small)
    for budget in ("small", asked / full, f"{asked / 2**10:.4f}KiB", f"{asked / 2**10:.4f}KiB@512×1"):
        assert elastic_checkpoint.find_submodel(directory, budget) == small
    middle = path[len(path) // 2].resolve(CONFIG)
    for other in (dataclasses.replace(metric, batch=3), dataclasses.replace(metric, context=32)):
        spelled = f"{exact_cost(other, CONFIG, middle) / 1e3:.5f}KB@{other.context}×{other.batch}"
        found = elastic_checkpoint.find_submodel(directory, spelled)
        assert exact_cost(other, CONFIG, found) == pytest.approx(exact_cost(other, CONFIG, middle), rel=1e-3)
    count = num_parameters(CONFIG, middle)
    assert num_parameters(CONFIG, elastic_checkpoint.find_submodel(directory, f"{count / 1e3:.6f}K")) == count
    with pytest.raises(
        ValueError, match=r"budget: got '1MiB@512' \(1\.00 MiB\); allowed: \d.* KiB to \d.* KiB \(512 tok"
    ):
        elastic_checkpoint.find_submodel(directory, "1MiB@512")


def test_the_prediction_is_what_the_exported_model_takes(family_of, tmp_path):
    _, run, _ = family_of("long")
    run.model.save_pretrained(tmp_path / "family")
    elastic_checkpoint.write(tmp_path / "family", CONFIG, run.members, [], run.metric)
    submodel = extract(tmp_path / "family", "small", tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    measured = latency_and_memory.memory(model, random_ids(CONFIG, 0, (run.metric.batch, run.metric.context)))
    dtypes = dict.fromkeys(("weights", "cache", "state", "conv_state"), "float32")
    parts = memory_parts(dataclasses.replace(run.metric, **dtypes), CONFIG, submodel)
    assert sum(parts.values()) - parts["activations"] == measured["weight_bytes"] + measured["cache_bytes"]


@pytest.mark.thorough
def test_parameters_are_counted_as_before(family_of):
    """The default's rows hold the very numbers of a count of parameters."""
    _, run, rows = family_of("parameters")
    assert run.metric == PARAMETERS and run.parent_cost == FULL
    soft = [r for row in rows if row["mode"] == "soft" for r in row["microbatches"]]
    assert all(r["cost"] == FULL for r in soft if r["budget"] == "full")
