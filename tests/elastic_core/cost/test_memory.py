"""Memory as a cost: bytes against those of extracted models and transformers' caches, and the gradient of their sum."""

import dataclasses
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, NemotronHConfig

from elastic_core import Submodel, extract
from elastic_core.config import ConfigError
from elastic_core.cost.element_types import ELEMENT_BYTES
from elastic_core.cost.memory import Memory, alive_per_token
from elastic_core.cost.metrics import exact_cost, expected_cost, memory_parts, num_parameters, read_metric
from elastic_core.model.architectures import parameter_layout
from elastic_core.model.architectures.nemotron_h import layers_of
from elastic_core.search.choices import Choices
from elastic_core.search.space import ElasticSpace
from tasks.evaluation import latency_and_memory
from tests.support.models.parents import (
    random_config,
    random_ids,
    random_llama_config,
    random_submodel,
    save_random_parent,
)
from tests.support.oracles.gradients import check_gradient

PER_LAYER = ("intermediate_size", "mamba_num_heads", "num_attention_heads")
WHOLE = {"weights": "float32", "cache": "float32", "state": "float32", "conv_state": "float32"}
ONE_BYTE = Memory(context=100, batch=3, weights="bf16", cache="fp8", state="float32", conv_state="bf16", chunk=7)


def sizes_of(config, submodel):
    """Sizes and kept layers as float64 tensors."""
    sizes = {key: torch.tensor(float(size), dtype=torch.float64) for key, size in submodel.sizes(config).items()}
    keep = torch.tensor([float(i in submodel.kept_layers) for i in range(len(config.layers_block_type))])
    return sizes, keep.double()


@pytest.mark.parametrize("seed", range(10))
def test_bytes_are_those_of_the_extracted_model_and_its_cache(tmp_path, seed):
    """Weights, keys and values, recurrent and convolution states of one and of several sequences, to the byte."""
    config = random_config(seed)
    save_random_parent(tmp_path / "parent", seed, config)
    submodel = random_submodel(config, seed, PER_LAYER if seed % 2 else ())
    attention = layers_of(config, "*")[0]  # without any, transformers has no cache
    submodel = dataclasses.replace(submodel, kept_layers=tuple({*submodel.kept_layers, attention}))
    extract(tmp_path / "parent", submodel, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, trust_remote_code=True)
    rng = random.Random(seed)
    for batch, context in ((1, rng.randint(5, 40)), (3, rng.randint(5, 40))):
        measured = latency_and_memory.memory(model.eval(), random_ids(config, seed, (batch, context)))
        predicted = memory_parts(Memory(context, batch, **WHOLE), config, submodel)
        assert predicted["weights"] == measured["weight_bytes"]
        assert predicted["kv_cache"] == measured["kv_cache_bytes"]
        assert predicted["ssm_state"] == measured["ssm_state_bytes"]
        assert predicted["conv_state"] == measured["conv_state_bytes"]
        assert all(isinstance(part, int) for part in predicted.values())


@pytest.mark.parametrize("seed", range(4))
def test_bytes_of_a_llama_and_its_cache(tmp_path, seed):
    config = random_llama_config(seed)
    save_random_parent(tmp_path / "parent", seed, config)
    submodel = random_submodel(config, seed)
    extract(tmp_path / "parent", submodel, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    measured = latency_and_memory.memory(model.eval(), random_ids(config, seed, (2, 17)))
    predicted = memory_parts(Memory(17, 2, **WHOLE), config, submodel)
    assert predicted["weights"] == measured["weight_bytes"]
    assert predicted["kv_cache"] == measured["kv_cache_bytes"] == measured["cache_bytes"]
    assert predicted["ssm_state"] == predicted["conv_state"] == 0


def test_bfloat16_halves_what_is_in_bfloat16(tmp_path):
    config = random_config(4)
    model = save_random_parent(tmp_path, 4, config).bfloat16()
    measured = latency_and_memory.memory(model, random_ids(config, 4, (1, 13)))
    predicted = memory_parts(Memory(13, cache="bf16", conv_state="bf16"), config)
    assert predicted["weights"] == measured["weight_bytes"]
    assert (
        predicted["kv_cache"] == measured["kv_cache_bytes"] and predicted["conv_state"] == measured["conv_state_bytes"]
    )


@pytest.mark.parametrize("weights", ELEMENT_BYTES)
def test_quantised_checkpoints_quantise_the_layers_matrices(weights):
    config = random_config(2)
    layers = {name: dims for name, dims in parameter_layout(config).items() if name.startswith("model.layers.")}
    matrices = sum(dims[0].size * dims[1].size for dims in layers.values() if len(dims) == 2)
    others = num_parameters(config) - matrices
    expected = {
        "float32": 4 * (matrices + others),
        "bf16": 2 * (matrices + others),
        "fp8": matrices + 2 * others,
        "int8": matrices + 2 * others,
        "fp4": matrices / 2 + matrices / 16 + 2 * others,
    }
    assert 0 < others < matrices
    assert memory_parts(Memory(8, weights=weights), config)["weights"] == expected[weights]


def test_cache_grows_with_context_and_batch_and_nothing_else_does():
    config, base = random_config(3), Memory(100, 2)
    parts = memory_parts(base, config)
    longer = memory_parts(dataclasses.replace(base, context=1000), config)
    more = memory_parts(dataclasses.replace(base, batch=6), config)
    assert longer["kv_cache"] == 10 * parts["kv_cache"]
    for name in ("weights", "ssm_state", "conv_state"):
        assert longer[name] == parts[name]
    for name in ("kv_cache", "ssm_state", "conv_state"):
        assert more[name] == 3 * parts[name] > 0
    assert more["weights"] == parts["weights"]


def test_the_12b_parent_at_128k():
    """Nemotron-Nano-12B-v2: bytes worked out by hand from its published shape."""
    pattern = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
    config = NemotronHConfig(
        vocab_size=131072,
        hidden_size=5120,
        layers_block_type=NemotronHConfig._pattern_to_list(pattern),
        intermediate_size=20480,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
        mamba_num_heads=128,
        mamba_head_dim=80,
        n_groups=8,
        ssm_state_size=128,
        conv_kernel=4,
    )
    parts = memory_parts(Memory(131072, 8, chunk=2048), config)
    assert parts["weights"] == 2 * 12_310_001_152
    assert parts["kv_cache"] == 8 * 6 * 2 * 8 * 128 * 131072 * 2  # 6 GiB of keys and 6 of values
    assert parts["ssm_state"] == 8 * 28 * 128 * 80 * 128 * 4
    assert parts["conv_state"] == 8 * 28 * (128 * 80 + 2 * 8 * 128) * 4 * 2
    assert parts["activations"] == 2 * 2048 * (2 * 5120 + 2 * 20480)  # of an MLP


def test_activations_are_of_the_widest_kept_layer():
    """By a submodel that keeps one layer at a time, and by one that keeps several."""
    config = random_config(6)
    metric, layout = Memory(500, chunk=300), parameter_layout(config)
    alone = {}
    for layer in range(len(config.layers_block_type)):
        shapes = [[dim.size for dim in dims] for name, dims in layout.items() if f"layers.{layer}." in name]
        wide = sum(sum(shape) - config.hidden_size for shape in shapes if len(shape) == 2)
        assert alive_per_token(config, layout)[layer].size == 2 * config.hidden_size + wide
        alone[layer] = 2 * 300 * (2 * config.hidden_size + wide)
    for kept in [(layer,) for layer in alone] + [(0, 2), tuple(alone)]:
        parts = memory_parts(metric, config, Submodel(kept_layers=kept))
        assert parts["activations"] == max(4 * config.vocab_size, *(alone[layer] for layer in kept))
    step = memory_parts(Memory(500, batch=5, chunk=1), config)  # of decoding: a token of every sequence
    assert step["activations"] == max(4 * 5 * config.vocab_size, 5 * max(alone.values()) / 300)
    assert memory_parts(Memory(10, chunk=300), config)["activations"] == max(
        4 * config.vocab_size, 10 * max(alone.values()) / 300
    )


@pytest.mark.parametrize("seed", range(6))
def test_expected_cost_at_one_hot_is_the_cost(seed):
    config = random_config(seed)
    submodels = [random_submodel(config, 7 * seed + i, PER_LAYER) for i in range(4)]
    for submodel in submodels:
        sizes, keep = sizes_of(config, submodel)
        assert expected_cost(ONE_BYTE, config, sizes, keep).item() == exact_cost(ONE_BYTE, config, submodel)
    columns = [sizes_of(config, submodel) for submodel in submodels]  # all of them in one call
    sizes = {key: torch.stack([sizes[key] for sizes, _ in columns]) for key in columns[0][0]}
    costs = expected_cost(ONE_BYTE, config, sizes, torch.stack([keep for _, keep in columns], 1))
    assert costs.tolist() == [exact_cost(ONE_BYTE, config, submodel) for submodel in submodels]


def make_space(seed, metric, heterogeneous=()):
    config = random_config(seed)
    num_layers = len(config.layers_block_type)
    attention, groups = config.num_key_value_heads, config.n_groups
    choices = Choices(
        hidden_size=(config.hidden_size, 12, 7),
        intermediate_size=(config.intermediate_size, 11, 4),
        mamba_num_heads=tuple(range(config.mamba_num_heads, 0, -groups)),
        mamba_head_dim=(config.mamba_head_dim, 5, 2),
        num_attention_heads=tuple(range(config.num_attention_heads, 0, -attention)),
        depth=tuple(range(num_layers, 0, -1)),
        heterogeneous=heterogeneous,
    )
    order = random.Random(seed).sample(range(num_layers), num_layers)
    return ElasticSpace(config, choices, tuple(order), metric=metric)


@pytest.mark.parametrize("heterogeneous", [(), PER_LAYER])
def test_a_space_counts_in_its_metric(heterogeneous):
    space, generator = make_space(5, ONE_BYTE, heterogeneous), torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randint(len(slot.sizes), (20,), generator=generator) for slot in space.slots], dim=1)
    costs = [exact_cost(ONE_BYTE, space.config, space.submodel(row.tolist())) for row in rows]
    assert space.costs(rows).tolist() == costs == [space.exact_cost(row.tolist()) for row in rows]
    for row, cost in zip(rows, costs, strict=True):
        one_hots = [torch.eye(len(slot.sizes)).double()[i] for slot, i in zip(space.slots, row, strict=True)]
        assert space.cost(one_hots).item() == cost
    if not heterogeneous:
        grid = space.grid_costs()
        assert [grid[tuple(row.tolist())].item() for row in rows] == costs


@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_is_that_of_finite_differences(seed):
    check_gradient(make_space(seed, ONE_BYTE, PER_LAYER), seed)


@pytest.mark.parametrize("seed", range(3))
def test_the_expectation_is_exact_but_for_activations(seed):
    """Of independent draws; the maximum of expectations is a lower bound of the maximum's."""
    space, generator = make_space(seed, ONE_BYTE), torch.Generator().manual_seed(seed)
    probs = [torch.rand(len(slot.sizes), generator=generator).double() for slot in space.slots]
    probs = [prob / prob.sum() for prob in probs]
    weights = torch.ones((), dtype=torch.float64)
    for prob in probs:
        weights = weights[..., None] * prob
    bare = make_space(seed, dataclasses.replace(ONE_BYTE, batch=1, chunk=1, activations="fp4"))
    for each in (bare, space):
        mean = (weights * each.grid_costs()).sum().item()
        assert each.cost(probs).item() <= mean * (1 + 1e-12)
    layers = layers_of(space.config, "*")
    keep = probs[-1] @ space.keep.double()
    caches = [memory_parts(ONE_BYTE, space.config, space.submodel([0] * 5 + [i]))["kv_cache"] for i in range(len(keep))]
    expected = sum(prob.item() * cache for prob, cache in zip(probs[-1], caches, strict=True))
    per_layer = memory_parts(ONE_BYTE, space.config)["kv_cache"] / len(layers)
    assert expected == pytest.approx(per_layer * keep[layers].sum().item(), rel=1e-12)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"context": 0}, "context: got 0; allowed: 1 or more"),
        ({"context": 8, "batch": 0}, "batch: got 0"),
        ({"context": 8, "chunk": 0}, "chunk: got 0"),
        ({"context": 8, "weights": "fp16x"}, "weights: got 'fp16x'; allowed: float32, bf16, fp8, int8, fp4"),
        ({"context": 8, "state": "half"}, "state: got 'half'; allowed: float32"),
    ],
)
def test_what_memory_is_not(fields, words):
    with pytest.raises(ConfigError, match=words):
        Memory(**fields)


def test_a_metric_is_written_and_read():
    for metric in (ONE_BYTE, read_metric("parameters"), read_metric("active_parameters")):
        assert read_metric(metric.to_json()) == metric
    for value in ("latency", {"metric": "latency"}, {"metric": "memory"}, {"metric": "memory", "context": 0}, 7):
        words = "cost: got .*; allowed: parameters, active_parameters, or the fields of metric memory"
        with pytest.raises(ValueError, match=words):
            read_metric(value)


def test_bytes_for_people():
    metric = Memory(131072, 8, weights="fp8")
    assert [metric.text(n) for n in (512, 2**20, 1.5 * 2**30, 3000 * 2**30)] == [
        "0.50 KiB", "1.00 MiB", "1.50 GiB", "3,000.00 GiB",
    ]  # fmt: skip
    assert metric.setting == "131,072 tokens × 8, weights fp8, cache bf16"
