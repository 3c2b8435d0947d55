"""The budgets of an elastic directory: by name, fraction and count, and in between."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from elastic_core import extract
from elastic_core.cost.budgets import TOLERANCE
from elastic_core.cost.metrics import num_parameters
from elastic_core.errors import UserError
from elastic_core.export import elastic_checkpoint
from elastic_core.export.elastic_checkpoint import find_submodel
from elastic_core.model.submodel import Submodel
from elastic_core.search.choices import Choices
from elastic_core.search.path import path_between
from elastic_core.search.selection import Member
from elastic_core.search.space import ElasticSpace
from tests.support.models.parents import random_elastic
from tests.support.models.routed_family import CONFIG, RANKING, SIZES

FULL = num_parameters(CONFIG)
FINE = {**SIZES, "hidden_size": tuple(range(16, 7, -1)), "intermediate_size": tuple(range(24, 7, -1))}
NAMES = ("full", "medium", "small")


@pytest.fixture(scope="module")
def elastic(tmp_path_factory):
    """A saved family and its members."""
    directory = tmp_path_factory.mktemp("family") / "model"
    random_elastic(0, CONFIG).save_pretrained(directory)
    space = ElasticSpace(CONFIG, Choices(**FINE), RANKING)
    family = [[0] * 6, [2, 8, 0, 1, 0, 0], [3, 16, 1, 2, 0, 1]]  # members that differ on nearly every axis
    members = {
        name: Member(target, space.submodel(indices))
        for name, target, indices in zip(NAMES, (1.0, 0.7, 0.4), family, strict=True)
    }
    elastic_checkpoint.write(directory, CONFIG, members, path_between(space, family))
    return directory, members


def test_what_is_written_is_read(elastic):
    directory, members = elastic
    content = elastic_checkpoint.read(directory)
    assert content["parent_num_parameters"] == FULL and list(content["budgets"]) == list(NAMES)
    for name, member in members.items():
        entry = content["budgets"][name]
        assert entry["target"] == member.target
        assert entry["num_parameters"] == num_parameters(CONFIG, member.submodel)


def test_trained_budgets_by_name_fraction_and_count(elastic):
    directory, members = elastic
    for name, member in members.items():
        count = num_parameters(CONFIG, member.submodel)
        assert find_submodel(directory, name) == member.submodel
        assert find_submodel(directory, count) == find_submodel(directory, str(count)) == member.submodel
        assert find_submodel(directory, f"{count / 1e3:.6f}K") == find_submodel(directory, f" {count / 1e6:.9f}m ")
    assert find_submodel(directory, 1) == find_submodel(directory, 1.0) == members["full"].submodel
    assert find_submodel(directory, FULL) == members["full"].submodel


@pytest.mark.parametrize("unit, factor", [("", 1), ("K", 1e3), ("M", 1e6), ("B", 1e9), ("T", 1e12), ("b", 1e9)])
def test_units(elastic, unit, factor):
    directory, members = elastic
    assert find_submodel(directory, f"{FULL / factor:.15f}{unit}") == members["full"].submodel


def test_budgets_in_between_are_served_by_the_path(elastic):
    directory, members = elastic
    sizes = [member.submodel for member in members.values()]
    served = []
    for fraction in np.linspace(0.4, 1, 30):
        served.append(find_submodel(directory, float(fraction)))
        assert abs(num_parameters(CONFIG, served[-1]) / (fraction * FULL) - 1) <= TOLERANCE
        assert served[-1].is_within(sizes[0], CONFIG) and sizes[2].is_within(served[-1], CONFIG)
    assert len(set(served)) >= 25  # not only the three trained ones


@pytest.mark.parametrize("budget, name", [(0.2, "small"), (1e3, "small"), ("9B", "full"), ("medium", "medium")])
def test_the_nearest_is_taken_if_asked(elastic, budget, name):
    directory, members = elastic
    assert find_submodel(directory, budget, nearest=True) == members[name].submodel
    with pytest.raises(UserError, match=r"budget: got 'tiny'; allowed: one of full"):
        find_submodel(directory, "tiny", nearest=True)


@pytest.mark.parametrize(
    "budget, words",
    [
        (FULL + 1, rf"budget: got {FULL + 1} .*to {FULL:,} parameters, or one of full, medium, small; the nearest"),
        ("9B", r"budget: got '9B' \(9,000,000,000 parameters\); allowed: .* the nearest submodel has"),
        (0.2, rf"budget: got 0\.2 \({0.2 * FULL:,.0f} parameters\)"),
        ("tiny", r"budget: got 'tiny'; allowed: one of full, medium, small, a fraction as 0\.75, a count as 9B"),
        ("9X", r"budget: got '9X'; allowed: one of"),
        ("B", r"budget: got 'B'; allowed: one of"),
        ("", r"budget: got ''; allowed: one of"),
        (0, r"budget: got 0; allowed"),
        (-0.5, r"budget: got -0\.5; allowed"),
        ("-9B", r"budget: got '-9B'; allowed"),
        (float("nan"), r"budget: got nan; allowed"),
        ("inf", r"budget: got 'inf'; allowed"),
        (True, r"budget: got True; allowed"),
    ],
)
def test_what_cannot_be_served_is_refused(elastic, budget, words):
    with pytest.raises(ValueError, match=words):
        find_submodel(elastic[0], budget)


def test_a_gap_in_the_path_names_the_nearest(elastic, tmp_path):
    directory, members = elastic
    random_elastic(0, CONFIG).save_pretrained(tmp_path / "model")
    elastic_checkpoint.write(tmp_path / "model", CONFIG, members, [])
    nearest = num_parameters(CONFIG, members["medium"].submodel)
    with pytest.raises(ValueError, match=rf"the nearest submodel has {nearest:,}"):
        find_submodel(tmp_path / "model", 0.75)
    assert find_submodel(tmp_path / "model", 0.75, nearest=True) == members["medium"].submodel
    assert find_submodel(tmp_path / "model", "medium") == find_submodel(directory, "medium")


def test_a_directory_without_budgets(tmp_path):
    with pytest.raises(ValueError, match=r"no elastic\.json, so it has no budgets"):
        find_submodel(tmp_path, 0.5)


@pytest.mark.parametrize("budget", ["small", 0.7, "in between"])
def test_extract_by_name_and_by_number(elastic, tmp_path, budget):
    directory, _ = elastic
    if budget == "in between":
        path = elastic_checkpoint.read(directory)["path"]
        budget = num_parameters(CONFIG, Submodel(**path[2]))
    submodel = extract(directory, budget, tmp_path / "out")
    assert submodel == find_submodel(directory, budget)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(CONFIG, submodel)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_extract_says_what_it_cannot_serve(elastic, tmp_path):
    with pytest.raises(ValueError, match=r"budget: got 'large'; allowed: one of full, medium, small"):
        extract(elastic[0], "large", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}", '{"cost": "parameters", "budgets": [], "path": []}'),
        *(
            '{"cost": 5, "budgets": {}, "path": []}',
            '{"cost": "parameters", "budgets": {"a": {"target": 1}}, "path": []}',
        ),
        '{"cost": "parameters", "budgets": {"a": {"target": "x", "submodel": {}}}, "path": []}',
        '{"cost": "parameters", "budgets": {"a": {"target": 1.0, "submodel": {"width": 3}}}, "path": []}',
        '{"cost": "parameters", "budgets": {}, "path": [{"hidden_size": "x"}]}',
    ],
)
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "elastic.json").write_text(content)
    with pytest.raises(UserError, match=rf"{tmp_path}/elastic\.json: "):
        elastic_checkpoint.read(tmp_path)
