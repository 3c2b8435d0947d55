"""`elastic measure`: every point of the grid is measured, on transformers' own modules; no seconds are promised."""

import copy
import itertools
import json

import pytest
import torch
import yaml

from elastic_core.config import ConfigError
from elastic_core.cost.latency import Latency
from elastic_core.cost.latency_table import REST, Table, axes_of, shape_of
from elastic_core.cost.metrics import exact_cost
from elastic_core.model.submodel import Submodel
from elastic_core.search.choices import Choices
from tasks.commands import layer_times
from tasks.commands import measure as command
from tasks.commands.layer_times import Decoder, MeasureSetting, Models
from tasks.commands.measure import grids, measure, samples, thin_out
from tasks.settings.merging import parameters
from tests.support.committed_params import ROOT
from tests.support.marks import thorough
from tests.support.models.moe_family import CHOICES as MOE_CHOICES
from tests.support.models.moe_family import CONFIG as MOE
from tests.support.models.parents import CONFIGS, random_config, random_llama_config
from tests.support.pipeline.command_line import call, error_of

QUICK = {"rounds": 1, "steps": 1}


def choices_of(config) -> Choices:
    if config is MOE:
        return MOE_CHOICES
    if config.model_type != "nemotron_h":
        return Choices(intermediate_size=(config.intermediate_size, 11, 7, 4))
    heads = tuple(range(config.mamba_num_heads, 0, -config.n_groups))
    return Choices(
        hidden_size=(config.hidden_size, 12), intermediate_size=(config.intermediate_size, 8), mamba_num_heads=heads
    )


def test_thinning_keeps_the_ends():
    assert thin_out((128, 120, 112, 104, 96, 88, 80, 72, 64), 3) == (64, 96, 128)
    assert thin_out((4, 2), 3) == (2, 4) and thin_out((7,), 2) == (7,) and thin_out((9, 5, 4, 1), 2) == (1, 9)


@pytest.mark.parametrize("family", CONFIGS)
def test_samples_are_every_point_of_every_part(family):
    config = CONFIGS[family](1)
    grid = grids(config, choices_of(config), 3)
    found = samples(config, grid)
    for part, sizes in grid.items():
        assert {sample.points[part] for sample in found} == set(itertools.product(*sizes))
    for sample in found:  # a point's sizes are the model's
        sizes = sample.submodel.sizes(config)
        for part, axes in axes_of(config).items():
            assert all(
                sample.points[part][i] in [sizes[k] for k in sizes if k.partition(".")[0] == a]
                for i, a in enumerate(axes)
            )


@pytest.mark.parametrize(
    "config", [random_config(1), random_llama_config(1), thorough(MOE)], ids=["hybrid", "llama", "moe"]
)
def test_a_table_has_a_positive_number_at_every_point(config):
    setting = MeasureSetting((5, 9), batch=2, **QUICK)
    before = torch.get_num_threads()
    table = measure(config, choices_of(config), setting)
    assert torch.get_num_threads() == before and table.contexts == (5, 9) and table.batch == 2
    assert set(table.parts) == {REST, *axes_of(config)} and table.shape == shape_of(config)
    assert "lm_eval" not in table.environment and table.environment["torch"] == torch.__version__
    for part in table.parts.values():
        for seconds in (part.decode, part.prefill):
            values = torch.tensor(seconds)
            assert values.shape == (2, *map(len, part.grid)) and (values > 0).all()
    assert Table.from_json(json.loads(json.dumps(table.to_json()))) == table
    assert exact_cost(Latency(table, 7), config) > 0


def test_models_share_their_numbers_and_decode_as_transformers_does():
    config = random_config(2)
    models = Models(config, MeasureSetting((4,)))
    large, small = (models.build(Submodel(hidden_size=size).resolve(config)) for size in (config.hidden_size, 9))
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        assert a.data_ptr() == b.data_ptr() and torch.isfinite(a).all()
    decoder = Decoder(small, MeasureSetting((4,), batch=3), 4)
    prompt = decoder.tokens
    assert prompt.shape == (3, 4) and decoder.step() > 0
    generated = [decoder.tokens]
    *layers, rest = decoder.step_by_layer()
    assert len(layers) == len(config.layers_block_type) and min(*layers, rest) > 0
    generated.append(decoder.tokens)
    assert not any(layer._forward_pre_hooks for layer in small.model.layers)
    expected = small.generate(prompt, max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert torch.equal(torch.cat([prompt, *generated], 1), expected)


def test_tokens_ask_many_experts():
    """As trained routers see to: else a step would take as long as a few experts do."""
    config, asked = copy.deepcopy(MOE), []
    config.n_routed_experts = 64
    models = Models(config, MeasureSetting((4,)))
    model = models.build(Submodel().resolve(config))
    layer = config.layers_block_type.index("moe")
    model.model.layers[layer].mixer.gate.register_forward_hook(lambda gate, inputs, found: asked.append(found[-1]))
    decoder = Decoder(model, MeasureSetting((4,), batch=32), 4)
    decoder.step()
    assert len(asked[-1].unique()) > 20


def test_the_command_writes_a_table_of_this_machine(tmp_path, monkeypatch):
    """In the profile's own setting, though the profile's table is not there yet; a second time it is replaced."""
    values = parameters("smoke")
    values["cost"] = {"metric": "latency", "table": "profiles/latency.json"}
    values["budgets"]["small"] = "1ms/token@40×2"
    values["choices"] = {"hidden_size": [48, 24]}
    monkeypatch.setattr("tasks.commands.measure.parameters", lambda name, overrides: values)
    monkeypatch.setattr("tasks.commands.measure.ROOT", tmp_path)
    monkeypatch.setattr(layer_times, "WARM_UP", 0)
    tracked = (ROOT / "profiles" / "latency.json").read_bytes()
    table, path = command.measure_profile("smoke", **QUICK)
    assert path == tmp_path / "profiles" / "measured" / "smoke.json" and Table.load(path) == table
    assert (table.contexts, table.batch, table.threads) == ((32, 40), 2, 1)
    assert table.parts["M"].grid == ((24, 48), (4,), (16,))
    told = command.describe(table, path)
    assert "2 × 40 tokens, float32" in told and "mamba_heads 4, mamba_channels 16" in told
    assert "cost: {metric: latency, table: profiles/measured/smoke.json}" in told
    changes = {"contexts": (3,), "batch": 1, "device": "cpu", **QUICK}
    _, other = command.measure_profile("smoke", out=tmp_path / "other.json", **changes)
    assert Table.load(other).contexts == (3, 32, 40) and Table.load(other).dtype == "float32"
    assert (ROOT / "profiles" / "latency.json").read_bytes() == tracked


def test_what_cannot_be_measured_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "table.json"):
        assert f"out: got '{out}'; allowed: a file that can be written; " in error_of("measure", "smoke", "--out", out)
    (tmp_path / "file").unlink()
    for option, words in {
        "batch=0": "batch: got 0",
        "dtype=fp8": "dtype: got 'fp8'",
        "device=tpu": "device: got 'tpu'",
    }.items():
        name, _, value = option.partition("=")
        told = error_of("measure", "smoke", "--out", tmp_path / "t.json", f"--{name}", value)
        assert f"{words}; allowed: " in told
    assert "profile: got 'nobody'; allowed: default" in error_of("measure", "nobody")
    with pytest.raises(ConfigError, match=r"points: got 1; allowed: 2 or more"):
        MeasureSetting((4,), points=1)
    told = error_of("measure", "smoke", "--out", tmp_path / "t.json", "--set", "choices.depth=[7]")
    assert "profiles/smoke.yaml (parent.model): choices.depth: got [7]; allowed: " in told
    assert list(tmp_path.iterdir()) == []
    assert "elastic measure latency" in call("measure", "--help")
    assert yaml.safe_load((ROOT / "profiles" / "latency.yaml").read_text())["cost"]["metric"] == "latency"
