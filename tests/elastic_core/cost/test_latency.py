"""Latency and throughput as costs: exact where measured, linear between, differentiable, and refused outside."""

import dataclasses
import json
import random

import pytest
import torch

from elastic_core import Submodel
from elastic_core.config import ConfigError
from elastic_core.cost.latency import Latency, Throughput
from elastic_core.cost.latency_table import Table, interpolate
from elastic_core.cost.metrics import exact_cost, expected_cost, read_metric
from elastic_core.model import architectures
from elastic_core.model.axes import FIELDS, WIDTHS
from elastic_core.model.dims import layer_of
from elastic_core.model.submodel import full_submodel
from elastic_core.search.choices import Choices
from elastic_core.search.space import ElasticSpace
from tests.support.models.parents import CONFIGS, random_config, random_moe_config, random_submodel
from tests.support.oracles.gradients import check_gradient
from tests.support.oracles.latencies import CONTEXTS, REST, make_table, points_of, seconds_of


def by_hand(config, submodel, context):
    """The sum of `seconds_of` over a submodel's layers: the oracle at points of the grid."""
    submodel = submodel.resolve(config)
    sizes, pattern = submodel.sizes(config), architectures.pattern(config)
    total = seconds_of(REST, {"hidden": sizes["hidden"]}, context)
    for layer in submodel.kept_layers:
        own = {key.partition(".")[0]: size for key, size in sizes.items() if layer_of(key) == layer}
        total += seconds_of(pattern[layer], {"hidden": sizes["hidden"], **own}, context)
    return total


def half_or_full(config, seed):
    """A submodel at random points of the grid that `make_table` has, with widths that differ between layers."""
    rng, fields = random.Random(seed), {}
    for field, axis in WIDTHS.items():
        keys = [key for key in architectures.units(config) if key.partition(".")[0] == axis]
        size = architectures.units(config)[keys[0]].size if keys else None
        groups = architectures.units(config)[keys[0]].groups if keys else 1
        if keys and size > 1 and size // 2 % groups == 0:
            fields[field] = rng.choice([size // 2, size])
    layers = range(architectures.num_layers(config))
    return Submodel(kept_layers=sorted(rng.sample(layers, rng.randint(1, len(layers)))), **fields)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("seed", range(4))
def test_at_points_of_the_grid_it_is_the_sum_of_what_was_measured(architecture, seed):
    config = CONFIGS[architecture](seed)
    table = make_table(config)
    for i, context in enumerate(CONTEXTS):
        submodel = half_or_full(config, 10 * seed + i)
        seconds = by_hand(config, submodel, context)
        assert exact_cost(Latency(table, context), config, submodel) == pytest.approx(1000 * seconds, rel=1e-12)
        throughput = Throughput(dataclasses.replace(table, batch=4), context)
        assert 1 / exact_cost(throughput, config, submodel) == pytest.approx(4 / seconds, rel=1e-12)


def test_every_part_is_exact_at_every_point():
    table = make_table(random_config(1), {"hidden_size": (8, 15, random_config(1).hidden_size)})
    for kind in table.parts:
        for sizes in points_of(table, kind):
            assert table._part_seconds(kind, sizes, CONTEXTS[0], "decode") == seconds_of(kind, sizes, CONTEXTS[0])


def test_it_is_linear_between_points_in_every_size_and_the_context():
    grid, generator = ((16, 64), (2, 5, 9), (3, 8)), torch.Generator().manual_seed(0)
    values = torch.rand(2, 3, 2, generator=generator, dtype=torch.float64)

    def at(*sizes):
        return interpolate(grid, values, sizes, ("context", "ffn", "hidden"))

    for low, high, middle, others in ((2, 5, 3.5, (16, 8)), (5, 9, 7, (64, 3)), (5, 9, 7, (40, 5))):
        context, hidden = others
        assert at(context, middle, hidden) == pytest.approx((at(context, low, hidden) + at(context, high, hidden)) / 2)
    assert at(40, 5, 3) == pytest.approx((at(16, 5, 3) + at(64, 5, 3)) / 2)
    rows, columns = torch.tensor([2.0, 4.0, 9.0])[:, None], torch.tensor([3.0, 6.0])  # broadcast
    table = at(16, rows, columns)
    assert table.shape == (3, 2) and table[2, 0].item() == pytest.approx(values[0, 2, 0].item(), rel=1e-6)
    assert table[1, 1].item() == pytest.approx(at(16, 4.0, 6.0), rel=1e-6)


def make_space(metric_of=Latency, heterogeneous=(), depth=None, seed=5):
    config = random_config(seed)
    num_layers, step = len(config.layers_block_type), {"mamba_num_heads": config.n_groups}
    step["num_attention_heads"] = config.num_key_value_heads
    sizes = {
        "hidden_size": (config.hidden_size, 14, 11, 8),
        "intermediate_size": (config.intermediate_size, 11, 4),
        "mamba_num_heads": tuple(range(config.mamba_num_heads, 0, -config.n_groups)),
        "mamba_head_dim": (config.mamba_head_dim, 5, 2),
        "num_attention_heads": tuple(range(config.num_attention_heads, 0, -config.num_key_value_heads)),
    }
    points = {name: tuple(sorted({values[0], values[-1], values[len(values) // 2]})) for name, values in sizes.items()}
    choices = Choices(**sizes, depth=depth or tuple(range(num_layers, 0, -1)), heterogeneous=heterogeneous)
    order = random.Random(seed).sample(range(num_layers), num_layers)
    return ElasticSpace(config, choices, tuple(order), metric=metric_of(make_table(config, points), 40))


@pytest.mark.parametrize("metric_of", [Latency, Throughput])
@pytest.mark.parametrize("heterogeneous", [(), ("intermediate_size", "mamba_num_heads", "num_attention_heads")])
def test_expected_cost_at_one_hot_is_the_cost(metric_of, heterogeneous):
    space, generator = make_space(metric_of, heterogeneous), torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randint(len(slot.sizes), (20,), generator=generator) for slot in space.slots], dim=1)
    costs = [exact_cost(space.metric, space.config, space.submodel(row.tolist())) for row in rows]
    assert space.costs(rows).tolist() == pytest.approx(costs, rel=1e-12)
    for row, cost in zip(rows, costs, strict=True):
        one_hots = [torch.eye(len(slot.sizes)).double()[i] for slot, i in zip(space.slots, row, strict=True)]
        assert space.cost(one_hots).item() == pytest.approx(cost, rel=1e-12)
    if not heterogeneous:
        grid = space.grid_costs()
        assert [grid[tuple(row.tolist())].item() for row in rows] == pytest.approx(costs, rel=1e-12)
        for dim in range(grid.dim()):  # a smaller size is never slower in this table, in no axis
            assert (grid.diff(dim=dim) <= 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_that_of_finite_differences(seed):
    check_gradient(make_space(seed=seed), seed)


def test_certain_choices_in_float32_do_not_leave_the_grid():
    """A softmax that sums to a little over one expects a little more than the largest size."""
    space = make_space()
    probs = [torch.zeros(len(slot.sizes)) for slot in space.slots]
    for prob in probs:
        prob[0] = 1 + 2e-7
    assert space.cost(probs).item() == pytest.approx(exact_cost(space.metric, space.config), rel=1e-5)


def test_sizes_outside_of_the_table_are_refused():
    config = random_config(1)
    metric = Latency(make_table(config), 16)
    with pytest.raises(
        ConfigError, match=r"hidden_size: got 3; allowed: \d+ to \d+, the range of the table .* `elastic m"
    ):
        exact_cost(metric, config, Submodel(hidden_size=3))
    sizes = {"hidden": torch.tensor([config.hidden_size, config.hidden_size + 1.0])}
    with pytest.raises(ConfigError, match=rf"hidden_size: got {config.hidden_size + 1}; allowed: \d+ to \d+"):
        expected_cost(metric, config, sizes, torch.ones(len(config.layers_block_type)))
    for context in (15, 65):
        with pytest.raises(ConfigError, match=rf"context: got {context}; allowed: 16 to 64 tokens.*elastic measure"):
            Latency(metric.table, context)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"vocab_size": 50}, r"measured for model\.embeddings\.weight of \d+, hidden \d+, but the parent has 50"),
        ({"ssm_state_size": 5}, r"measured for layers M, mixer\.in_proj\.weight of "),
        ({"n_groups": 1, "ssm_state_size": 32}, r"measured for layers M, mixer\.\S+ of mamba_heads \d+ in 2 groups"),
        ({"head_dim": 6}, r"measured for layers \*, mixer\.q_proj\.weight of "),
        ({"mlp_bias": None}, r"measured for layers -, mixer\.up_proj\.bias of "),
    ],
)
def test_another_parents_table_is_refused(changes, words):
    seed = next(s for s in range(50) if random_config(s).n_groups == 2 and random_config(s).ssm_state_size == 16)
    config = random_config(seed)
    table = make_table(config)
    values = config.to_dict() | changes
    if "mlp_bias" in changes:
        values["mlp_bias"] = not config.mlp_bias
    other = type(config)(**values)
    with pytest.raises(ConfigError, match=r"cost\.table: " + words + r".*; allowed: a table of this parent; .* `elast"):
        exact_cost(Latency(table, 16), other)
    deeper = type(config)(**config.to_dict() | {"layers_block_type": config.layers_block_type * 2})
    assert exact_cost(Latency(table, 16), deeper) > exact_cost(Latency(table, 16), config)  # more of the same layers


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("metric_of", [Latency, Throughput])
def test_a_table_survives_its_file_and_the_checkpoint(architecture, metric_of, tmp_path):
    config = CONFIGS[architecture](2)
    metric = metric_of(make_table(config), 33)
    metric.table.save(tmp_path / "deep" / "table.json")
    assert Table.load(tmp_path / "deep" / "table.json") == metric.table
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["table.json"]
    assert read_metric(json.loads(json.dumps(metric.to_json()))) == metric
    submodel = full_submodel(config)
    assert exact_cost(read_metric(metric.to_json()), config, submodel) == exact_cost(metric, config)


@pytest.mark.parametrize(
    "text, words",
    [
        (None, r"cost\.table: got '.*t\.json', which does not exist; allowed: a file that `elastic measure PROFILE` w"),
        ("{", r"cost\.table: got '.*t\.json' \(.*\); allowed: a file that `elastic measure PROFILE` writes"),
        ("{}", r"\(not a table of latencies: has no 'format'"),
        ("[1]", r"\(not a table of latencies"),
        ('{"format": 99}', r"\(not a table of format 1\)"),
    ],
)
def test_a_file_that_is_no_table_is_refused(text, words, tmp_path):
    if text is not None:
        (tmp_path / "t.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        Table.load(tmp_path / "t.json")


def test_a_table_knows_how_many_experts_a_token_asks():
    config = random_moe_config(1)
    table = make_table(config)
    table.check(config)
    config.num_experts_per_tok += 1
    with pytest.raises(ConfigError, match="layers E, num_experts_per_tok of"):
        table.check(config)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda part: part["grid"][0].reverse(), "sizes of a grid are not in ascending order"),
        (lambda part: part["decode"].pop(), r"seconds of shape \(1, \d.*; expected \(2, "),
        (lambda part: part.update(decode=[[0 for _ in row] for row in part["decode"]]), "all above 0"),
    ],
)
def test_a_table_of_another_shape_is_refused(change, words):
    values = json.loads(json.dumps(make_table(random_config(0)).to_json()))
    change(values["parts"][REST])
    with pytest.raises(ValueError, match=words):
        Table.from_json(values)
    with pytest.raises(ValueError, match=rf"cost: got 'latency' \(.*{words}") as caught:
        read_metric({"metric": "latency", "context": 16, "table": values})
    assert "allowed: parameters, active_parameters, or the fields of metric" in str(caught.value)


def test_texts_for_people():
    config = random_config(0)
    table = make_table(config, environment={"device": "A Chip"}, threads=2, batch=8)
    latency, throughput = Latency(table, 64), Throughput(table, 64)
    assert latency.text(35.25) == "35.25 ms/token" and throughput.text(1 / 1200) == "1,200 tokens/s"
    assert latency.setting == throughput.setting == "64 tokens × 8, float32 on A Chip, 2 threads"
    assert FIELDS["ffn"] == "intermediate_size"


@pytest.mark.parametrize("seed", range(2))
def test_random_submodels_cost_between_the_smallest_and_the_parent(seed):
    config = random_config(seed)
    full = {key.partition(".")[0]: unit.size for key, unit in architectures.units(config).items()}
    metric = Latency(make_table(config, {FIELDS[axis]: (1, size) for axis, size in full.items() if size > 1}), 16)
    for i in range(20):
        submodel = random_submodel(config, 100 * seed + i, ("intermediate_size",))
        assert 0 < exact_cost(metric, config, submodel) <= exact_cost(metric, config)
