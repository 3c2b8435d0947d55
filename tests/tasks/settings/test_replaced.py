"""Parameters of older versions: refused with what replaced them, also where their value is null."""

import pytest

from elastic_core.config import ConfigError
from tasks.settings.load import read
from tasks.settings.replaced import KEYS, VALUES
from tests.support.committed_params import put

GIVEN = (None, 1, {}, {"title": "A family"})


def test_entries_of_all_kinds_are_tried_below():
    assert {"report", "rank.top_channels", "parent.training.budgets_per_batch"} < set(KEYS)
    assert VALUES == {("rank.measure", "written"): "output_norm"}


@pytest.mark.parametrize("value", GIVEN, ids=str)
@pytest.mark.parametrize("path", KEYS)
def test_a_parameter_that_is_gone_is_refused_with_advice(values, path, value):
    put(*path.split("."), value)(values)
    with pytest.raises(ConfigError) as caught:
        read(values, "params.yaml")
    assert str(caught.value) == f"params.yaml: {path}: no longer a parameter; {KEYS[path]}"


@pytest.mark.parametrize(("path", "old"), VALUES)
def test_a_value_that_has_another_name_is_refused_with_it(values, path, old):
    put(*path.split("."), old)(values)
    with pytest.raises(ConfigError) as caught:
        read(values, "params.yaml")
    new = VALUES[path, old]
    assert str(caught.value) == f"params.yaml: {path}: got {old!r}, which is now called {new!r}"
    put(*path.split("."), new)(values)
    read(values, "params.yaml")


@pytest.mark.parametrize("section", ["rank", "train_short", "parent"])
@pytest.mark.parametrize("value", [None, 3, ["top_channels"]], ids=str)
def test_a_section_that_is_no_section_is_named_itself(values, section, value):
    """Nothing is looked for in it."""
    put(section, value)(values)
    with pytest.raises(ConfigError, match=rf"^params\.yaml: {section}: got .*; allowed: a section with keys"):
        read(values, "params.yaml")
