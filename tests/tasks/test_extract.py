"""Stage extract: the submodel of every budget, trained or not."""

from types import SimpleNamespace

import pytest

from elastic_core.config import ConfigError
from elastic_core.cost.metrics import num_parameters
from elastic_core.export import elastic_checkpoint
from elastic_core.model.submodel import Submodel
from elastic_core.search.selection import Member
from tasks import extract
from tests.support.models.parents import random_elastic
from tests.support.models.routed_family import CONFIG


def test_budgets_that_were_not_trained_are_found(tmp_path, monkeypatch):
    medium, between = Submodel(hidden_size=12), Submodel(hidden_size=14)
    members = {"full": Member(1.0, Submodel()), "medium": Member(0.7, medium)}
    random_elastic(0, CONFIG).save_pretrained(tmp_path / "model")
    elastic_checkpoint.write(tmp_path / "model", CONFIG, members, [between])
    monkeypatch.setattr(extract, "FAMILY", tmp_path / "model")
    share = num_parameters(CONFIG, between) / num_parameters(CONFIG)
    settings = SimpleNamespace(untrained={"between": share, "far": 0.05})
    assert extract.find_submodel(settings, "between") == between.resolve(CONFIG)
    assert extract.find_submodel(settings, "medium").resolve(CONFIG) == medium.resolve(CONFIG)
    with pytest.raises(ConfigError, match=r"^params\.yaml: untrained\.far: .*got 0\.05 .*the nearest submodel has"):
        extract.find_submodel(settings, "far")
