"""The committed params.yaml, a small valid variant of it, changes to it, and a small parent on disk."""

import functools
import json
from pathlib import Path

import pytest
import yaml

from tasks.settings import load as settings
from tasks.settings.merging import parameters
from tests.support.models.parents import save_random_parent, write_tokenizer
from tests.support.models.routed_family import CONFIG

ROOT = Path(__file__).resolve().parents[2]


COMMITTED = yaml.safe_load((ROOT / "params.yaml").read_text())
COMMITTED["cost"]["table"] = str(ROOT / COMMITTED["cost"]["table"])  # found from every directory


MEMORY = {"metric": "memory", "context": 512, "batch": 2, "table": COMMITTED["cost"]["table"]}


@functools.cache
def profile_text(name) -> str:
    """As JSON: hundreds of tests read it, and YAML with comments takes a hundred times as long."""
    return json.dumps(parameters(name))


def profile_values(name):
    """params.yaml with the values of a profile, as plain lists and dictionaries."""
    values = json.loads(profile_text(name))
    values["cost"]["table"] = str(ROOT / values["cost"]["table"])
    return values


def write(values, tmp_path, monkeypatch):
    """A params.yaml in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def load(values, tmp_path, monkeypatch):
    """Load as a user would: a params.yaml in the working directory."""
    write(values, tmp_path, monkeypatch)
    return settings.load()


@pytest.fixture
def values():
    """A small valid set, of the committed structure."""
    values = profile_values("smoke")
    values["budgets"] = {"full": 1.0, "medium": 0.7, "small": 0.45}
    for stage in ("train_short", "train_extended"):
        values[stage]["budget_shares"] = {"full": 0.2, "medium": 0.4, "small": 0.4}
        values[stage].pop("loss_by_budget", None)
        values[stage]["teacher"] = "frozen"
        values[stage]["loss"] = {"ce_weight": 0.0, "kl_weight": 1.0}
    return values


def put(*path_and_value):
    """A change of such values: put("rank", "batches", 3) sets a parameter, or a whole section."""
    *path, key, value = path_and_value

    def change(values):
        for name in path:
            values = values[name]
        values[key] = value

    return change


def parent_directory(tmp_path, **changes):
    """A tiny parent on disk, with `changes` in its config.json."""
    directory = tmp_path / "parent"
    save_random_parent(directory, 0, CONFIG)
    write_tokenizer(directory)
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def use_parent(values, directory):
    """Start from such a parent, with choices that it can give."""
    values["parent"] = {"path": str(directory)}
    values["choices"] = {"hidden_size": list(range(16, 5, -1)), "intermediate_size": list(range(24, 1, -1))}
