"""What is said of a family whose budgets are memory: by `elastic inspect` and `extract`, in reports, in a run's key."""

import dataclasses
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from elastic_core import Submodel, extract
from elastic_core.cost.memory import Memory
from elastic_core.cost.metrics import exact_cost, num_parameters
from elastic_core.export import elastic_checkpoint
from elastic_core.search.selection import Member
from tasks.evaluation import latency_and_memory
from tasks.reporting import columns, predictions
from tests.support.models.parents import random_elastic, random_ids
from tests.support.pipeline.command_line import CONFIG, MEMBERS, call, error_of

METRIC = Memory(700, 2, weights="fp8", cache="fp8", chunk=1)
TARGETS = {"full": 1.0, "uneven": 0.5, "small": 0.3}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    directory = tmp_path_factory.mktemp("memory") / "family"
    random_elastic(5, CONFIG).save_pretrained(directory)
    members = {name: Member(TARGETS[name], submodel) for name, submodel in MEMBERS.items()}
    elastic_checkpoint.write(directory, CONFIG, members, [], METRIC)
    return directory


def test_inspect_says_what_serving_takes(family):
    told, full = json.loads(call("inspect", "--json", family)), exact_cost(METRIC, CONFIG)
    assert told["memory"] == {**dataclasses.asdict(METRIC), "setting": METRIC.setting, "parent": full}
    for name, entry in told["budgets"].items():
        assert entry["cost"] == exact_cost(METRIC, CONFIG, MEMBERS[name])
        assert entry["share"] == entry["cost"] / full and entry["target_cost"] == TARGETS[name] * full
        assert entry["parameters"] == num_parameters(CONFIG, MEMBERS[name])
    lines = call("inspect", family).splitlines()
    assert any("700 tokens × 2, weights fp8, cache fp8, which budgets are shares of" in line for line in lines)
    row = next(line for line in lines if line.startswith("uneven")).split()
    cost = exact_cost(METRIC, CONFIG, MEMBERS["uneven"])
    assert row[1:5] == ["0.5", f"{cost / full:.4f}", f"{0.5 * full / 2**20:.3f}", f"{cost / 2**20:.3f}"]
    assert row[5] == f"{num_parameters(CONFIG, MEMBERS['uneven']):,}"
    parent = next(line for line in lines if line.startswith("(parent)")).split()
    assert parent[3] == parent[4] == f"{full / 2**20:.3f}"


def test_extract_says_what_serving_takes(family, tmp_path):
    cost = exact_cost(METRIC, CONFIG, MEMBERS["small"])
    told = call("extract", family, tmp_path / "a", "-b", "small")
    assert f"{cost / 2**10:,.2f} KiB of memory for {METRIC.setting}" in told
    told = call("extract", family, tmp_path / "b", "-b", f"{cost / 2**10:.3f}KiB")
    assert f"{cost / 2**10:,.2f} KiB of memory" in told and str(MEMBERS["small"].resolve(CONFIG)) in told
    other = Memory(64, 5, weights="fp8", cache="fp8", chunk=1)
    cost = exact_cost(other, CONFIG, MEMBERS["uneven"])
    told = call("extract", family, tmp_path / "c", "-b", f"{cost / 2**10:.3f}KiB@64×5")
    assert f"{cost / 2**10:,.2f} KiB of memory for 64 tokens × 5, weights fp8" in told
    assert "16GiB@128k" in error_of("extract", family, tmp_path / "d")
    assert "(9.00 GiB); allowed: " in error_of("extract", family, tmp_path / "d", "-b", "9GiB@700x2")
    assert not (tmp_path / "d").exists()


def test_a_family_of_parameters_serves_memory_too(family, tmp_path):
    """In bf16, as nothing else is said; but somebody has to say the context."""
    random_elastic(5, CONFIG).save_pretrained(tmp_path / "family")
    members = {name: Member(1.0 / (i + 1), submodel) for i, (name, submodel) in enumerate(MEMBERS.items())}
    elastic_checkpoint.write(tmp_path / "family", CONFIG, members, [])
    assert elastic_checkpoint.read(tmp_path / "family")["cost"] == "parameters"
    cost = exact_cost(Memory(3000), CONFIG, MEMBERS["small"])
    told = call("extract", tmp_path / "family", tmp_path / "model", "-b", f"{cost / 1e3:.4f}KB@3000")
    assert str(MEMBERS["small"].resolve(CONFIG)) in told and "3,000 tokens × 1, weights bf16" in told
    assert "memory" not in call("extract", tmp_path / "family", tmp_path / "other", "-b", "small")
    assert "allowed: bytes at a context" in error_of("extract", tmp_path / "family", tmp_path / "no", "-b", "9GiB")
    told = json.loads(call("inspect", "--json", tmp_path / "family"))
    assert told["memory"] is None and "cost" not in told["budgets"]["small"]


def test_the_report_has_the_budget_the_prediction_and_what_was_counted(family, tmp_path):
    """Predicted and counted agree to the byte, for every model that was built."""
    scores = {}
    for name in ("parent", *MEMBERS):
        extract(family, MEMBERS.get(name, Submodel()), tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32, trust_remote_code=True)
        ids = random_ids(CONFIG, 0, (1, 30))
        submodel = MEMBERS[name].to_dict() if name in MEMBERS else None
        scores[name] = {"extended": {"memory": latency_and_memory.memory(model.eval(), ids), "submodel": submodel}}
    found = predictions.columns(scores, CONFIG, METRIC, {"full": 1.0, "small": 0.3})
    for row, (name, versions) in enumerate(scores.items()):
        memory = versions["extended"]["memory"]
        assert found["predicted_mib"][row] * 2**20 == memory["weight_bytes"] + memory["cache_bytes"]
        assert found["serving_mib"][row] * 2**20 == exact_cost(METRIC, CONFIG, MEMBERS.get(name))
    assert [math.isnan(value) for value in found["budget_mib"]] == [True, False, True, False]
    assert found["budget_mib"][-1] * 2**20 == pytest.approx(0.3 * exact_cost(METRIC, CONFIG))
    described = columns._memory(METRIC, {"memory": scores["parent"]["extended"]["memory"]})
    assert set(described) == set(found) and all(METRIC.setting in described[name].how for name in list(described)[:2])
    assert "context 700, batch 2, weights fp8" in predictions.note(METRIC)
