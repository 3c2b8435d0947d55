"""Submodels in between: NestedModel serves them as views of one copy of the weights, exactly as they are extracted."""

import copy
import dataclasses
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from elastic_core import Submodel, extract
from elastic_core.cost.metrics import num_parameters
from elastic_core.errors import UserError
from elastic_core.export import elastic_checkpoint
from elastic_core.export.nested import NestedModel
from elastic_core.model import hf
from elastic_core.search.choices import Choices
from elastic_core.search.path import path_between
from elastic_core.search.selection import Member
from elastic_core.search.space import ElasticSpace
from tests.support.models import moe_family, routed_family
from tests.support.models.parents import random_ids, random_llama_config, relative_error, save_random_parent

NAMES = ("full", "medium", "small")
HETEROGENEOUS = ("intermediate_size", "mamba_num_heads")


def hybrid(config):
    """A copy of a configuration, with values that transformers and this library read alike."""
    config = copy.deepcopy(config)
    config.time_step_min, config.eos_token_id = 1e-30, None  # see tests/elastic_core/export/test_extract.py
    return config


def spaces() -> dict[str, ElasticSpace]:
    llama = random_llama_config(3)
    heads, kv_heads, hidden = llama.num_attention_heads, llama.num_key_value_heads, llama.hidden_size
    sizes = {
        "hidden_size": tuple(range(hidden, heads, -heads)),
        "intermediate_size": (llama.intermediate_size, llama.intermediate_size // 2),
        "num_attention_heads": tuple(range(heads, 0, -kv_heads))[:1],
        "depth": (llama.num_hidden_layers, llama.num_hidden_layers - 1),
    }
    return {
        "homogeneous": routed_family.make_space(),
        "heterogeneous": routed_family.make_space(HETEROGENEOUS),
        "experts": ElasticSpace(moe_family.CONFIG, moe_family.CHOICES, (0, 2, 1, 3)),
        "llama": ElasticSpace(llama, Choices(**sizes), range(llama.num_hidden_layers)),
    }


def make_family(space: ElasticSpace, directory) -> tuple[list[Submodel], list[list[int]]]:
    """A random parent in `directory`, with the largest, the smallest and a member in between, and its path."""
    save_random_parent(directory, 0, hybrid(space.config))
    smallest = [end - 1 for end in space.num_servable]
    medium = [last if number % 2 else last // 2 for number, last in enumerate(smallest)]
    family = [[0] * len(smallest), medium, smallest]
    members = {name: Member(1.0, space.submodel(indices)) for name, indices in zip(NAMES, family, strict=True)}
    path = path_between(space, family)
    elastic_checkpoint.write(directory, hf.read_config(directory), members, path)
    return path, family


@pytest.mark.parametrize("kind", ["homogeneous", "heterogeneous", "experts", "llama"])
def test_submodels_of_the_path_compute_what_is_extracted(kind, tmp_path):
    space = spaces()[kind]
    path, _ = make_family(space, tmp_path / "family")
    model = NestedModel.from_pretrained(tmp_path / "family")
    config, ids = model.config, random_ids(model.config, 1)
    assert len(path) >= 4
    for number in (0, len(path) // 3, 2 * len(path) // 3, len(path) - 1):
        submodel = path[number].resolve(config)
        extract(tmp_path / "family", submodel, tmp_path / str(number))
        extracted = AutoModelForCausalLM.from_pretrained(tmp_path / str(number), trust_remote_code=True).eval()
        with torch.no_grad():
            assert relative_error(model.at(submodel)(ids).logits, extracted(ids).logits) < 1e-5  # float32, other order


@pytest.mark.parametrize("kind", ["homogeneous", "heterogeneous", "experts", "llama"])
def test_all_of_the_path_and_all_members_are_views_of_one_copy(kind, tmp_path):
    space = spaces()[kind]
    path, _ = make_family(space, tmp_path)
    model = NestedModel.from_pretrained(tmp_path)
    shared = {weight.untyped_storage().data_ptr() for weight in model.weights.values()}
    for budget in (*NAMES, *path[:: max(1, len(path) // 8)]):
        for name, parameter in model.at(budget).named_parameters():
            if parameter.dim() == 2 and not name.endswith("gate.weight"):
                assert parameter.untyped_storage().data_ptr() in shared, (budget, name)


def test_budgets_by_share_are_served_from_one_copy(tmp_path):
    """Also two that are not nested in each other."""
    space = spaces()["homogeneous"]
    path, _ = make_family(space, tmp_path)
    model, ids = NestedModel.from_pretrained(tmp_path), random_ids(space.config, 1)
    full = num_parameters(model.config)
    assert any(not small.is_within(large, model.config) for large, small in itertools.pairwise(path))
    for submodel in path[::8]:
        share = num_parameters(model.config, submodel) / full
        found = elastic_checkpoint.find_submodel(tmp_path, share)
        assert model.at(share) is model.at(found) and abs(num_parameters(model.config, found) / full - share) < 1e-9
        new = model.generate(ids, share, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
        assert new.shape == (len(ids), ids.shape[1] + 1)


def test_a_path_of_an_earlier_version_is_still_served(tmp_path):
    """It was one chain from member to member. Each step took the next choice of one slot."""
    space = spaces()["homogeneous"]
    _, family = make_family(space, tmp_path)
    chain, current = [], list(family[0])
    for goal in family[1:]:
        for slot in reversed(range(len(goal))):
            while current[slot] < goal[slot]:
                current[slot] += 1
                chain.append(space.submodel(current))
    config = hf.read_config(tmp_path)
    members = {name: Member(1.0, space.submodel(indices)) for name, indices in zip(NAMES, family, strict=True)}
    elastic_checkpoint.write(tmp_path, config, members, chain)
    model = NestedModel.from_pretrained(tmp_path)
    for submodel in chain:
        extracted = model.at(submodel)
        assert sum(p.numel() for p in extracted.parameters()) == num_parameters(config, submodel)
        assert elastic_checkpoint.find_submodel(tmp_path, num_parameters(config, submodel)).resolve(config) in [
            other.resolve(config) for other in chain
        ]


def test_a_path_that_is_not_between_the_members_is_refused(tmp_path):
    space = spaces()["homogeneous"]
    _, family = make_family(space, tmp_path)
    members = {name: Member(1.0, space.submodel(indices)) for name, indices in zip(NAMES, family, strict=True)}
    wide = dataclasses.replace(members["small"].submodel, hidden_size=space.config.hidden_size)
    elastic_checkpoint.write(tmp_path, hf.read_config(tmp_path), members, [wide])
    with pytest.raises(UserError, match="is not nested in"):
        NestedModel.from_pretrained(tmp_path)


def test_any_size_of_one_axis_is_served_and_crossing_pairs_are_not(tmp_path):
    """Members are views whatever else elastic.json lists. Heads and channels need pairs on one chain."""
    space = routed_family.make_space(hidden_size=(16, 8), depth=(5, 4))
    save_random_parent(tmp_path, 0, hybrid(space.config))
    config = hf.read_config(tmp_path)
    small = Submodel(mamba_num_heads=2, mamba_head_dim=2, num_attention_heads=2, intermediate_size=8).resolve(config)
    members = {"full": Member(1.0, Submodel().resolve(config)), "small": Member(0.5, small)}
    fewer_heads = dataclasses.replace(small, mamba_head_dim=6)
    fewer_channels = dataclasses.replace(small, mamba_num_heads=4)
    elastic_checkpoint.write(tmp_path, config, members, [fewer_heads, fewer_channels])
    model = NestedModel.from_pretrained(tmp_path)
    for submodel in ("full", "small", fewer_heads, dataclasses.replace(small, intermediate_size=11)):
        assert sum(p.numel() for p in model.at(submodel).parameters()) > 0
    with pytest.raises(UserError, match="its rows are not the first ones in memory; extract it"):
        model.at(fewer_channels)
