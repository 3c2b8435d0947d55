"""Budgets in time: how they are said, a family that is trained under one, and what is told of it."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from elastic_core.config import ConfigError
from elastic_core.config import load as load_section
from elastic_core.cost.budgets import Cost, parse
from elastic_core.cost.latency import Latency, Throughput, digits
from elastic_core.cost.memory import Memory
from elastic_core.cost.metrics import PARAMETERS, exact_cost, num_parameters
from elastic_core.cost.targets import family_metric, shares
from elastic_core.export import elastic_checkpoint
from elastic_core.model.architectures.nemotron_h import layers_of
from elastic_core.search.choices import Choices
from elastic_core.search.path import path_between
from elastic_core.search.selection import Member, check_reachable, select
from elastic_core.search.space import ElasticSpace
from tasks.parents.config import new_config as model_config
from tasks.parents.targets import metric_of_family
from tasks.reporting import columns, predictions
from tasks.settings import load as settings_file
from tests.support.committed_params import COMMITTED, ROOT, load
from tests.support.models.budgeted_family import CHOICES, CONFIG, RANKING, train_family
from tests.support.models.parents import random_elastic
from tests.support.oracles.latencies import make_table
from tests.support.pipeline.command_line import CONFIG as SERVED
from tests.support.pipeline.command_line import MEMBERS, call, error_of
from tests.support.pipeline.stages import check_parameters, run_stage

POINTS = {
    name: tuple(sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]}))
    for name, sizes in vars(CHOICES).items()
    if sizes and name not in ("depth", "heterogeneous")
}
TABLE = make_table(CONFIG, POINTS)
METRIC = Latency(TABLE, 40)
FULL = exact_cost(METRIC, CONFIG)


@pytest.mark.parametrize(
    "given, kind, amount, context, batch",
    [
        ("35ms/token", "latency", 35, None, None),
        ("0.2 s/token", "latency", 200, None, None),
        ("35ms/token@4k", "latency", 35, 4096, None),
        ("35MS/Token @ 4k × 8", "latency", 35, 4096, 8),
        ("1.5ms/tokenx2", "latency", 1.5, None, 2),
        ("1200tokens/s", "throughput", 1 / 1200, None, None),
        ("1.2e3tokens/s@100x8", "throughput", 1 / 1200, 100, 8),
    ],
)
def test_spellings(given, kind, amount, context, batch):
    budget = parse(given)
    assert (budget.kind, budget.context, budget.batch) == (kind, context, batch)
    assert budget.amount == pytest.approx(amount) and not budget.is_full


@pytest.mark.parametrize(
    "given", ["35ms", "0ms/token", "35ms/s", "1200/s", "tokens/s", "9B/s", "-3ms/token", "5h/token"]
)
def test_what_is_no_time(given):
    with pytest.raises(ConfigError, match=r"small: got .*; allowed: .* time as 35ms/token or 1200tokens/s"):
        parse(given, "small")


def test_time_is_a_share_of_the_parents_time():
    rate = 1000 / FULL
    budgets = {"full": 1.0, "a": f"{0.8 * FULL:.9f}ms/token", "b": f"{rate / 0.6:.6f}tokens/s", "c": 0.5}
    expected = {"full": 1.0, "a": pytest.approx(0.8), "b": pytest.approx(0.6), "c": 0.5}
    assert shares(budgets, METRIC, CONFIG) == expected == shares(budgets, Throughput(TABLE, 40), CONFIG)
    other = Latency(TABLE, 64)  # said in another context, it is a share in that
    assert shares({"a": f"{0.8 * exact_cost(other, CONFIG):.9f}ms/token@64"}, METRIC, CONFIG)["a"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    "given, own, words",
    [
        (
            "9s/token",
            METRIC,
            r"a: got '9s/token'; allowed: up to the parent's own 0\.\d+ ms/token \(40 tokens × 1, floa",
        ),
        ("1tokens/s", METRIC, r"a: got '1tokens/s'; allowed: the parent's own [\d,.]+ tokens/s or more \(40 tokens"),
        (
            "0.1ms/token",
            PARAMETERS,
            r"a: got '0\.1ms/token'; allowed: a share, a count or bytes; time needs .*metric: l",
        ),
        ("9tokens/s", Memory(8), r"a: got '9tokens/s'; allowed: a share, a count or bytes; time needs"),
        ("0.1ms/token×2", METRIC, r"a: got '0\.1ms/token×2'; allowed: ×1 or nothing, as in the table"),
        (
            "0.1ms/token@1k",
            METRIC,
            r"a: context: got 1024; allowed: 16 to 64 tokens, as in the table; measure it again",
        ),
    ],
)
def test_times_that_cannot_be(given, own, words):
    with pytest.raises(ConfigError, match=r"budgets\." + words):
        shares({"a": given}, own, CONFIG)


def section(**values):
    return load_section(Cost, values, "cost")


@pytest.mark.parametrize("metric", ["latency", "throughput"])
def test_the_section_names_the_table_and_budgets_may_say_the_rest(metric, tmp_path):
    TABLE.save(tmp_path / "t.json")
    kind, cost = (
        {"latency": Latency, "throughput": Throughput}[metric],
        {"metric": metric, "table": f"{tmp_path}/t.json"},
    )
    assert family_metric(section(**cost), {"full": 1.0}) == kind(TABLE, 64)  # the longest context
    assert family_metric(section(**cost, context=20), {"full": 1.0, "a": 0.5}) == kind(TABLE, 20)
    assert family_metric(section(**cost), {"a": "0.1ms/token@20×1", "b": "9tokens/s"}) == kind(TABLE, 20)
    for values, budgets, words in [
        ({}, {"a": "9B"}, r"budgets\.a: got '9B'; allowed: a share of the parent's .*, or time, as long as cost\.metr"),
        (
            {"context": 20},
            {"a": "1ms/token@30"},
            r"budgets\.a: got '1ms/token@30'; allowed: the context of section cost",
        ),
        ({"batch": 3}, {}, r"cost\.batch: got 3; allowed: 1, as in .*t\.json; measure it again"),
        ({"context": 8000}, {}, r"cost\.context: got 8000; allowed: 16 to 64 tokens"),
        ({"table": "/nowhere.json"}, {}, r"cost\.table: got '/nowhere\.json', which does not exist; .*elastic measure"),
    ]:
        with pytest.raises(ConfigError, match=words):
            family_metric(section(**{**cost, **values}), budgets)
    with pytest.raises(ConfigError, match=rf"cost\.table: got None; allowed: a file .*, as long as metric is {metric}"):
        section(metric=metric)
    with pytest.raises(ConfigError, match=rf"cost\.cache: got 'fp8'; allowed: nothing, as long as metric is {metric}"):
        section(**cost, cache="fp8")


@pytest.fixture(scope="module")
def family(data):
    """A run of 80 steps, soft for 60, at 0.6 of the parent's time, and its rows."""
    budgets = {"full": 1.0, "small": f"{0.6 * FULL:.9f}ms/token"}
    return train_family(data, METRIC, budgets)


def test_a_family_lands_on_its_time(family):
    run, rows = family
    small = run.members["small"].submodel
    assert abs(exact_cost(METRIC, CONFIG, small) / (0.6 * FULL) - 1) <= 0.02 and run.metric == METRIC
    assert run.members["full"].submodel == run.model.full
    soft = [r for row in rows if row["mode"] == "soft" for r in row["microbatches"] if r["budget"] == "small"]
    losses = [r["router_loss"] for r in soft]
    assert max(losses[-5:]) < 0.5 * max(losses)  # it comes nearer to the target, from where it was farthest
    errors = [row["budgets"]["small"]["budget_error"] for row in rows if "small" in row["budgets"]]
    assert errors[-1] < 0.02


def test_its_checkpoint_needs_no_table(family, tmp_path):
    """Served by name, share, milliseconds and tokens per second, from elastic.json alone; and in other metrics."""
    run, _ = family
    run.model.save_pretrained(tmp_path)
    path = path_between(run.router.space, run.indices)
    elastic_checkpoint.write(tmp_path, CONFIG, run.members, path, run.metric)
    small = run.members["small"].submodel
    asked = exact_cost(METRIC, CONFIG, small)
    for budget in (
        "small",
        asked / FULL,
        f"{asked:.9f}ms/token",
        f"{1000 / asked:.6f}tokens/s",
        f"{asked:.9f}ms/token@40×1",
    ):
        found = elastic_checkpoint.find_submodel(tmp_path, budget)
        assert exact_cost(METRIC, CONFIG, found) == pytest.approx(asked, rel=1e-6)
    longer = Latency(TABLE, 64)
    found = elastic_checkpoint.find_submodel(tmp_path, f"{exact_cost(longer, CONFIG, small):.9f}ms/token@64")
    assert exact_cost(longer, CONFIG, found) == pytest.approx(exact_cost(longer, CONFIG, small), rel=1e-6)
    count = num_parameters(CONFIG, path[len(path) // 2])
    assert num_parameters(CONFIG, elastic_checkpoint.find_submodel(tmp_path, count)) == count
    with pytest.raises(ValueError, match=r"budget: got '1tokens/s' \(1 tokens/s\); allowed: [\d,]+ to [\d,]+ tokens/s"):
        elastic_checkpoint.find_submodel(tmp_path, "1tokens/s")


def test_less_time_never_selects_a_slower_submodel():
    space = ElasticSpace(CONFIG, CHOICES, RANKING, metric=METRIC)
    uniform, costs, bound = [torch.zeros(len(slot.sizes)) for slot in space.slots], [], [0] * len(space.slots)
    for share in (0.9, 0.8, 0.7, 0.6):
        bound = select(space, uniform, share * FULL, bound, 0.02)
        costs.append(exact_cost(METRIC, CONFIG, space.submodel(bound)) / FULL)
        assert costs[-1] == pytest.approx(share, rel=0.02)
    assert costs == sorted(costs, reverse=True)


def test_what_has_no_cache_in_transformers_is_not_chosen():
    """With the cheapest sizes left to a depth without attention, the budget is refused instead."""
    first = [*(i for i in range(6) if i not in layers_of(CONFIG, "*")), *layers_of(CONFIG, "*")]
    choices = dataclasses.replace(CHOICES, depth=(6, 5, 4, 3))
    space = ElasticSpace(CONFIG, choices, tuple(first), metric=METRIC)
    assert space.num_servable[-1] == 2  # of six and five layers
    kept = space.grid_costs()[..., :2].min().item() / FULL
    below = space.grid_costs().min().item() / FULL
    uniform = [torch.zeros(len(slot.sizes)) for slot in space.slots]
    assert select(space, uniform, below * FULL, [0] * len(space.slots), 0.02) is None
    with pytest.raises(ConfigError, match=r"allowed: 0\.\d+ to 1\.0, .*; depths up to 4 are excluded"):
        check_reachable(space, {"full": 1.0, "small": below})
    check_reachable(space, {"full": 1.0, "small": kept})
    found = select(space, uniform, kept * FULL, [0] * len(space.slots), 0.02)
    assert set(layers_of(CONFIG, "*")) & set(space.submodel(found).kept_layers)
    per_layer = dataclasses.replace(
        choices, heterogeneous=("intermediate_size", "mamba_num_heads", "num_attention_heads")
    )
    space = ElasticSpace(CONFIG, per_layer, tuple(first), metric=METRIC)
    uniform = [torch.zeros(len(slot.sizes)) for slot in space.slots]
    assert select(space, uniform, below * FULL, [0] * len(space.slots), 0.02) is None


TARGETS = {"full": 1.0, "uneven": 0.8, "small": 0.5}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A family with a table of its own whose every size is in it."""
    directory = tmp_path_factory.mktemp("time") / "family"
    random_elastic(5, SERVED).save_pretrained(directory)
    points = {name: tuple(range(1, getattr(SERVED, name) + 1)) for name in POINTS}
    metric = Throughput(make_table(SERVED, points, environment={"device": "A Chip"}, batch=2), 32)
    members = {name: Member(TARGETS[name], submodel) for name, submodel in MEMBERS.items()}
    elastic_checkpoint.write(directory, SERVED, members, [], metric)
    return directory, metric


def test_inspect_and_extract_tell_the_time(served, tmp_path):
    directory, metric = served
    step = Latency(metric.table, metric.context)
    told, full = json.loads(call("inspect", "--json", directory)), exact_cost(step, SERVED)
    assert told["time"] == {
        **{"metric": "throughput", "context": 32, "batch": 2, "setting": metric.setting},
        "parent": pytest.approx(full),
    }
    lines, small = call("inspect", directory).splitlines(), exact_cost(step, SERVED, MEMBERS["small"])
    assert told["budgets"]["small"]["cost"] == pytest.approx(small)
    assert any("ms/token for 32 tokens × 2, float32 on A Chip, 1 thread, which budgets are shares" in x for x in lines)
    row = next(line for line in lines if line.startswith("small")).split()
    assert row[1:6] == ["0.5", f"{small / full:.4f}", f"{0.5 * full:,.4g}", f"{small:,.4g}", digits(2000 / small)]
    told = call("extract", directory, tmp_path / "a", "-b", "small")
    both = f"{small:,.4g} ms/token, {digits(2000 / small)} tokens/s for 32 tokens × 2, float32 on A Chip, 1 thread"
    assert both in told
    assert both in call("extract", directory, tmp_path / "b", "-b", f"{small:.9f}ms/token")
    assert "time such as 35ms/token" in error_of("extract", directory, tmp_path / "c")


def test_the_report_has_the_prediction_beside_what_was_measured(served):
    _, metric = served
    metric = dataclasses.replace(metric, table=dataclasses.replace(metric.table, batch=1))
    latency = {"threads": 1, "prompt_tokens": 16, "new_tokens": 4}
    values = {"memory": {"element_type": "float32"}, "latency": latency}
    scores = {"parent": {"parent": {**values, "submodel": None}}}
    scores |= {name: {"extended": {**values, "submodel": m.to_dict()}} for name, m in MEMBERS.items()}
    found = predictions.columns(scores, SERVED, metric, {"full": 1.0, "small": 0.5})
    described = columns._time(metric, scores["parent"]["parent"])
    assert set(found) == set(described) and "A Chip" in described["serving_ms"].how
    step, evaluated = Latency(metric.table, 32), Latency(metric.table, 16)
    for row, name in enumerate(scores):
        assert found["serving_ms"][row] == exact_cost(step, SERVED, MEMBERS.get(name))
        assert found["serving_rate"][row] == pytest.approx(1000 / found["serving_ms"][row])
        assert found["predicted_ms"][row] == exact_cost(evaluated, SERVED, MEMBERS.get(name))
        ratio = found["predicted_ms"][row] / exact_cost(evaluated, SERVED)
        assert found["predicted_ratio"][row] == pytest.approx(ratio)
    assert [math.isnan(value) for value in found["budget_time"]] == [True, False, True, False]
    assert found["budget_time"][-1] == pytest.approx(2 / exact_cost(metric, SERVED))
    assert "metric of the budgets is throughput, predicted for 32 tokens" in predictions.note(metric)
    for other in ({"threads": 2}, {"prompt_tokens": 8}):  # evaluated in a setting that the table has not
        scores["parent"]["parent"]["latency"] = latency | other
        assert "predicted_ms" not in columns._time(metric, scores["parent"]["parent"])
    assert predictions.columns(scores, SERVED, PARAMETERS, {}) == {} and predictions.note(PARAMETERS) == ""


def test_parameters_with_a_table_are_checked_before_anything_runs(tmp_path, monkeypatch):
    """Budgets below all choices, a missing table, and one of another parent."""
    values = yaml.safe_load(yaml.safe_dump(COMMITTED))
    parent = load(values, tmp_path, monkeypatch)
    config = model_config(parent.parent.model, parent.prepare_data.vocab_size)
    sizes = {name: (sizes[-1], sizes[0]) for name, sizes in values["choices"].items() if name in POINTS}
    table = make_table(config, sizes)
    table.save(tmp_path / "mine.json")
    values["cost"] = {"metric": "throughput", "table": str(tmp_path / "mine.json")}
    full = exact_cost(Throughput(table, 64), config)
    values["budgets"] |= {"medium": f"{1 / (0.7 * full):.6f}tokens/s"}
    settings = load(values, tmp_path, monkeypatch)
    assert metric_of_family(settings) == Throughput(table, 64)
    check_parameters()
    for change, words in [
        (
            {"small": 0.01},
            r"budgets\.small: got 0\.01; allowed: [\d,.]+, with all choices at their cheapest, to .* token",
        ),
        ({"small": "9e9tokens/s"}, r"budgets\.small: got '9e9tokens/s'; allowed: [\d,.]+, with all choices"),
        ({"small": "1tokens/s"}, r"budgets\.small: got '1tokens/s'; allowed: the parent's own .* or more"),
    ]:
        load({**values, "budgets": {**values["budgets"], **change}}, tmp_path, monkeypatch)
        for refuse in (check_parameters, lambda: run_stage("prepare_data")):
            with pytest.raises(SystemExit, match=r"^error: params\.yaml: " + words):
                refuse()
    untrained = {"x": f"{100 * full:.6f}ms/token"}  # the same, as latency
    load({**values, "untrained": untrained}, tmp_path, monkeypatch)
    with pytest.raises(SystemExit, match=r"untrained\.x: got '.*ms/token'; allowed: a share between the trained"):
        check_parameters()
    load(values, tmp_path, monkeypatch)
    with pytest.raises(SystemExit, match=r"hidden_size: got 64; allowed: 72 to 128, the range of the table of lat"):
        make_table(config, sizes | {"hidden_size": (72, 128)}).save("mine.json")
        check_parameters()
    with pytest.raises(SystemExit, match=r"cost\.table: measured for .*; allowed: a table of this parent"):
        TABLE.save("mine.json")
        check_parameters()
    Path("mine.json").unlink()
    with pytest.raises(ConfigError, match=r"params\.yaml: cost\.table: got '.*mine\.json'; allowed: .*elastic measure"):
        load(values, tmp_path, monkeypatch)


def test_the_committed_table_is_the_default_parents():
    """And has every size that params.yaml and profiles/latency.yaml choose from."""
    metric = family_metric(section(**{**COMMITTED["cost"], "metric": "latency"}), {"full": 1.0})
    settings = load_section(Choices, COMMITTED["choices"], "choices")
    values = settings_file.load(ROOT / "params.yaml")
    config = model_config(values.parent.model, values.prepare_data.vocab_size)
    space = ElasticSpace(config, settings, tuple(range(8)), metric=metric)
    costs = space.grid_costs()
    assert (costs > 0).all() and costs.min() < 0.9 * costs.max()
