"""The committed params.yaml, and a small valid variant of it."""

import copy
from pathlib import Path

import pytest
import yaml

from tasks.settings import load as settings
from tasks.settings.profiles import _merge

ROOT = Path(__file__).resolve().parents[2]


COMMITTED = yaml.safe_load((ROOT / "params.yaml").read_text())


def load(values, tmp_path, monkeypatch):
    """Load as a user would: a params.yaml in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return settings.load()


@pytest.fixture
def values():
    """A small valid set, of the committed structure."""
    values = copy.deepcopy(COMMITTED)
    _merge(values, yaml.safe_load((ROOT / "profiles" / "smoke.yaml").read_text()))
    values["budgets"] = {"full": 1.0, "medium": 0.7, "small": 0.45}
    for stage in ("train_short", "train_extended"):
        values[stage]["budget_shares"] = {"full": 0.2, "medium": 0.4, "small": 0.4}
        values[stage].pop("loss_by_budget", None)
        values[stage]["teacher"] = "frozen"
        values[stage]["loss"] = {"ce_weight": 0.0, "kl_weight": 1.0}
    return values
