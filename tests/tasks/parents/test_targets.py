"""Budgets in every spelling, as shares of the parent that params.yaml describes."""

import pytest

from elastic_core.cost.memory import Memory
from elastic_core.cost.metrics import PARAMETERS, exact_cost, num_parameters
from tasks.parents.config import new_config
from tasks.parents.targets import metric_of_family, resolve, resolve_served
from tests.support.committed_params import MEMORY, load


def test_absolute_budgets(values, tmp_path, monkeypatch):
    """Of the parent that params.yaml describes: a count, and bytes, whose setting the budgets may say as well."""
    values["budgets"] |= {"medium": "77K"}
    values["untrained"] = {"compact": 0.6, "long": "300KiB@8k"}  # counted in something else: left to the extraction
    settings = load(values, tmp_path, monkeypatch)
    config = new_config(settings.parent.model, settings.prepare_data.vocab_size)
    full = num_parameters(config)
    assert metric_of_family(settings) == PARAMETERS
    assert resolve(settings, config) == {"full": 1.0, "medium": pytest.approx(77e3 / full), "small": 0.45}
    serving = exact_cost(Memory(8192), config)
    expected = {"compact": 0.6, "long": pytest.approx(300 * 2**10 / serving)}
    assert {name: share for name, share in resolve_served(settings, config).items() if name in expected} == expected
    metric = Memory(512, 2)
    asked = 0.7 * exact_cost(metric, config)
    values |= {"cost": {"metric": "memory", "table": MEMORY["table"]}, "untrained": {}}
    values["budgets"] |= {"medium": f"{asked / 2**10:.6f}KiB@512×2"}
    settings = load(values, tmp_path, monkeypatch)
    assert metric_of_family(settings) == metric
    assert list(resolve(settings, config).values()) == [1.0, pytest.approx(0.7), 0.45]
    values["cost"] = MEMORY
    assert metric_of_family(load(values, tmp_path, monkeypatch)) == metric
