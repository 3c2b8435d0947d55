"""Norms of submodels: slice, extracted directory and NestedModel compute with the same gains, also between budgets."""

import copy
import dataclasses
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from elastic_core import ElasticModel, NestedModel, Submodel, extract, rank, sort_
from elastic_core.cost.metrics import num_parameters
from elastic_core.errors import UserError
from elastic_core.export import elastic_checkpoint
from elastic_core.model import architectures
from elastic_core.model.norm_gains import BUDGETS, RATIOS, BudgetGains
from elastic_core.search.selection import Member
from tests.support.models.parents import (
    CONFIGS,
    random_ids,
    random_submodel,
    relative_error,
    save_random_parent,
)
from tests.support.oracles.calibration import batches_of


def sorted_model(directory, architecture: str, seed: int) -> ElasticModel:
    """A random parent, sorted and rotated, with norm ratios."""
    config = CONFIGS[architecture](seed)
    config.tie_word_embeddings, config.time_step_min, config.eos_token_id = False, 1e-30, None
    save_random_parent(directory, seed, config)
    model = ElasticModel.from_pretrained(directory)
    return sort_(model, rank(model, batches_of(model.config, seed), depth_method="one_shot_nmse"))


def save_family(model: ElasticModel, directory) -> dict[str, Submodel]:
    """An elastic checkpoint with random gains for two budgets and a submodel in between. Returns all by name."""
    config, names = model.config, architectures.norm_names(model.config)
    step = config.num_attention_heads if config.model_type == "llama" else 1
    big = Submodel(hidden_size=config.hidden_size - step).resolve(config)
    layers = tuple(range(len(model.model.layers)))
    small = Submodel(hidden_size=step, kept_layers=layers[:-1], intermediate_size=3).resolve(config)
    if "*" not in architectures.pattern(config)[:-1] and config.model_type == "nemotron_h":
        small = dataclasses.replace(small, kept_layers=layers)
    between = dataclasses.replace(big, hidden_size=(big.hidden_size + step) // 2 // step * step)
    submodels, generator = {"big": big, "small": small}, torch.Generator().manual_seed(0)
    gains = {
        budget: {name: 1 + 0.3 * torch.randn(config.hidden_size, generator=generator) for name in names}
        for budget in submodels
    }
    model.norm_gains = BudgetGains(submodels, gains)
    model.save_pretrained(directory)
    members = {"full": Member(1.0, model.full), "big": Member(0.9, big), "small": Member(0.1, small)}
    elastic_checkpoint.write(directory, config, members, [between], private_norms=True)
    return {"full": model.full, "big": big, "between": between, "small": small}


@pytest.mark.parametrize(("architecture", "seed"), [("nemotron_h", 1), ("nemotron_h", 4), ("llama", 2), ("llama", 3)])
def test_slice_extracted_model_and_nested_model_have_the_same_gains(tmp_path, architecture, seed):
    model = sorted_model(tmp_path / "parent", architecture, seed)
    submodels, ids = save_family(model, tmp_path / "family"), random_ids(model.config, 1)
    loaded, nested = ElasticModel.from_pretrained(tmp_path / "family"), NestedModel.from_pretrained(tmp_path / "family")
    shared = copy.deepcopy(model)
    shared.norm_gains = None
    for name, submodel in submodels.items():
        extract(tmp_path / "family", submodel, tmp_path / name)
        extracted = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            expected = extracted(ids, use_cache=False).logits
            assert relative_error(model(ids, submodel), expected) < 1e-5
            assert relative_error(loaded(ids, submodel), expected) < 1e-5
            assert relative_error(nested.at(submodel)(ids).logits, expected) < 1e-5
            if name != "full":
                assert relative_error(shared(ids, submodel), expected) > 1e-2
        assert sum(p.numel() for p in extracted.parameters()) == num_parameters(model.config, submodel)
    weights = {weight.untyped_storage().data_ptr() for weight in nested.weights.values()}
    for name in ("big", "small"):
        matrices = (p for p in nested.at(submodels[name]).parameters() if p.dim() == 2)
        assert all(matrix.untyped_storage().data_ptr() in weights for matrix in matrices)


@pytest.mark.parametrize("seed", range(3))
def test_an_untrained_slice_is_extracted_with_the_gains_of_its_size(tmp_path, seed):
    model = sorted_model(tmp_path / "parent", "nemotron_h", seed)
    model.save_pretrained(tmp_path / "sorted")
    submodel, ids = random_submodel(model.config, seed, all_layers=True), random_ids(model.config, 1)
    extract(tmp_path / "sorted", submodel, tmp_path / "small")
    with torch.no_grad():
        extracted = AutoModelForCausalLM.from_pretrained(tmp_path / "small")(ids, use_cache=False).logits
        assert relative_error(ElasticModel.from_pretrained(tmp_path / "sorted")(ids, submodel), extracted) < 1e-5


def test_gains_between_budgets_are_mixtures_by_hidden_size_and_then_by_parameters(tmp_path):
    model = sorted_model(tmp_path / "parent", "nemotron_h", 1)
    submodels, config = save_family(model, tmp_path / "family"), model.config
    big, small, gains = submodels["big"], submodels["small"], model.norm_gains.gains
    for between in (submodels["between"], dataclasses.replace(small, hidden_size=small.hidden_size + 1)):
        weight = (between.hidden_size - small.hidden_size) / (big.hidden_size - small.hidden_size)
        for name, gain in model.gains_of(between).items():
            assert torch.allclose(gain, weight * gains["big"][name] + (1 - weight) * gains["small"][name])
    same = {"big": big, "small": dataclasses.replace(big, intermediate_size=3)}
    model.norm_gains = BudgetGains(same, gains)
    between = dataclasses.replace(big, intermediate_size=7)
    sizes = [num_parameters(config, each) for each in (same["small"], between, big)]
    weight = (sizes[1] - sizes[0]) / (sizes[2] - sizes[0])
    name = architectures.norm_names(config)[0]
    expected = weight * gains["big"][name] + (1 - weight) * gains["small"][name]
    assert torch.allclose(model.gains_of(between)[name], expected)


def test_lost_and_damaged_gains_are_named(tmp_path):
    model = sorted_model(tmp_path / "parent", "nemotron_h", 1)
    save_family(model, tmp_path / "family")
    shutil.copytree(tmp_path / "family", tmp_path / "cut")
    (tmp_path / "cut" / BUDGETS).write_bytes((tmp_path / "cut" / BUDGETS).read_bytes()[:-8])
    with pytest.raises(UserError, match=BUDGETS):
        extract(tmp_path / "cut", "small", tmp_path / "out")
    (tmp_path / "family" / BUDGETS).rename(tmp_path / "family" / RATIOS)
    with pytest.raises(UserError, match=f"no {BUDGETS}"):
        extract(tmp_path / "family", "small", tmp_path / "out")
    with pytest.raises(UserError, match="lacks model"):
        ElasticModel.from_pretrained(tmp_path / "family")


def test_the_same_gains_are_the_same_bytes_every_time(tmp_path):
    """Two runs of one family are compared by their files; the safetensors library writes metadata in a random order."""
    model = sorted_model(tmp_path / "parent", "nemotron_h", 1)
    save_family(model, tmp_path / "family")
    (tmp_path / "again").mkdir()
    for _ in range(20):
        model.norm_gains.write(tmp_path / "again")
        assert (tmp_path / "again" / BUDGETS).read_bytes() == (tmp_path / "family" / BUDGETS).read_bytes()
