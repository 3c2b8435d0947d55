"""Memory and latency of a model: bytes against sums over the configuration, seconds against a clock of our own."""

import itertools

import pytest
import torch

from tasks.evaluation import latency_and_memory
from tasks.settings.sections import LatencyOptions
from tests.support.models.parents import random_config, random_ids, save_random_parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_parent(tmp_path_factory.mktemp("parent"), seed=3)


@pytest.mark.parametrize("seed, length", [(3, 1), (3, 29), (8, 40)])
def test_memory_is_what_the_configuration_says(tmp_path, seed, length):
    config = random_config(seed)
    model = save_random_parent(tmp_path, seed, config)
    measured = latency_and_memory.memory(model, random_ids(config, 0, (1, length)))
    types = list(config.layers_block_type)
    mamba = sum(kind in ("mamba", "linear_attention") for kind in types)
    attention = sum(kind in ("attention", "full_attention") for kind in types)
    inner = config.mamba_num_heads * config.mamba_head_dim
    conv = inner + 2 * config.n_groups * config.ssm_state_size
    kv = 4 * attention * 2 * length * config.num_key_value_heads * config.head_dim
    ssm = 4 * mamba * inner * config.ssm_state_size
    windows = 4 * mamba * conv * config.conv_kernel
    assert mamba and attention
    assert measured == {
        "weight_bytes": sum(4 * parameter.numel() for parameter in model.parameters()),
        "cache_tokens": length,
        "kv_cache_bytes": kv,
        "ssm_state_bytes": ssm,
        "conv_state_bytes": windows,
        "cache_bytes": kv + ssm + windows,
        "element_type": "float32",
    }


def test_the_bytes_count_the_element_type(model):
    ids = random_ids(model.config, 0, (1, 9))
    whole = latency_and_memory.memory(model, ids)
    half = latency_and_memory.memory(model.bfloat16(), ids)
    model.float()
    assert half["weight_bytes"] * 2 == whole["weight_bytes"] and half["element_type"] == "bfloat16"
    assert half["kv_cache_bytes"] * 2 == whole["kv_cache_bytes"]


def test_a_sequence_goes_on_as_without_a_cache(model):
    ids, sequence = random_ids(model.config, 1, (1, 12)), latency_and_memory.Sequence(model)
    sequence.step(ids)
    for _ in range(4):
        with torch.no_grad():
            best = model(ids, use_cache=False).logits[:, -1:].argmax(-1)
        assert torch.equal(sequence.token, best)
        ids = torch.cat([ids, best], 1)
        sequence.step()
    assert len(sequence.seconds) == 5


def fake_seconds(monkeypatch, seconds: dict):
    """Let every step of a model take the seconds that its list says, in turn; the order of the steps is noted."""
    order, lists = [], {model: itertools.cycle(values) for model, values in seconds.items()}

    def step(self, input_ids=None):
        order.append((self.model, input_ids is not None))
        self.seconds.append(next(lists[self.model]))

    monkeypatch.setattr(latency_and_memory.Sequence, "step", step)
    return order


def test_latency_compares_step_by_step(monkeypatch):
    # A prompt and three tokens a repeat. The parent always takes twice the time, while the machine slows down.
    mine = [9.0, 9.0, 9.0, 9.0, 8.0, 1.0, 2.0, 3.0, 6.0, 10.0, 20.0, 30.0]
    order = fake_seconds(monkeypatch, {"model": mine, "parent": [2 * value for value in mine]})
    section = LatencyOptions(prompt_tokens=5, new_tokens=3, repeats=2)
    assert latency_and_memory.latency(section, "model", "parent", torch.zeros(1, 5, dtype=torch.int64)) == {
        "prompt_tokens": 5,
        "new_tokens": 3,
        "repeats": 2,
        "threads": 1,
        "prefill_seconds": 7.0,  # of 8 and 6: the first repeat warms up
        "parent_prefill_seconds": 14.0,
        "prefill_ratio": 0.5,
        "prefill_ratio_quartiles": [0.5, 0.5],
        "per_token_seconds": 6.5,  # of 1, 2, 3, 10, 20, 30
        "parent_per_token_seconds": 13.0,
        "per_token_ratio": 0.5,
        "per_token_ratio_quartiles": [0.5, 0.5],
    }
    assert len(order) == 2 * 3 * 4 and [prompt for _, prompt in order[:8]] == [True] * 2 + [False] * 6
    assert [name for name, _ in order[:4]] == ["model", "parent", "parent", "model"]  # neither is always first


def test_the_spread_is_the_middle_half_of_the_ratios(monkeypatch):
    ratios = [1.0, 0.5, 0.7, 0.6, 0.8, 0.9]  # of a warm-up, and then of a prompt and five tokens
    fake_seconds(monkeypatch, {"model": [1.0] * 6 + ratios, "parent": [1.0] * 12})
    section = LatencyOptions(prompt_tokens=5, new_tokens=5, repeats=1)
    found = latency_and_memory.latency(section, "model", "parent", torch.zeros(1, 5, dtype=torch.int64))
    assert found["per_token_ratio"] == pytest.approx(0.7)
    assert found["per_token_ratio_quartiles"] == pytest.approx([0.6, 0.8])
    assert found["prefill_ratio_quartiles"] == [1.0, 1.0]  # a single repeat has no spread


def test_the_parent_is_its_own_measure(monkeypatch, model):
    result = latency_and_memory.latency(
        LatencyOptions(prompt_tokens=4, new_tokens=2, repeats=2), model, None, random_ids(model.config, 0, (1, 4))
    )
    assert result["prefill_ratio"] == result["per_token_ratio"] == 1.0
    assert result["per_token_seconds"] == result["parent_per_token_seconds"] > 0


def test_only_the_measurement_is_confined_to_its_threads(monkeypatch):
    before, seen = torch.get_num_threads(), []
    fake_seconds(monkeypatch, {"model": [1.0]})
    monkeypatch.setattr(latency_and_memory.statistics, "median", lambda values: seen.append(torch.get_num_threads()))
    step = latency_and_memory.Sequence.step
    monkeypatch.setattr(
        latency_and_memory.Sequence,
        "step",
        lambda self, ids=None: (seen.append(torch.get_num_threads()), step(self, ids)),
    )
    latency_and_memory.latency(
        LatencyOptions(new_tokens=1, repeats=1, threads=before + 1), "model", None, torch.zeros(1, 1)
    )
    assert seen == [before + 1] * 4 + [before] * 4


def test_the_environment_is_named():
    place = latency_and_memory.environment()
    assert place["device"] and place["cores"] >= 1 and place["torch"] == torch.__version__
