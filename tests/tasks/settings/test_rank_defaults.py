"""The ranking method is the same for whoever does not choose: the library, a short params.yaml, the committed one."""

import dataclasses
import inspect

import pytest

from elastic_core import rank
from elastic_core.search.importance.depth import METHODS
from elastic_core.search.importance.methods import AGGREGATIONS, DEPTH_METHODS
from elastic_core.search.importance.widths import AGGREGATE
from tasks.settings.sections import Rank
from tests.support.committed_params import COMMITTED


@pytest.mark.parametrize("option", ["basis", "private_norms", "measure", "aggregation", "depth_method"])
def test_the_defaults_of_rank_its_section_and_params_yaml_agree(option):
    parameter = inspect.signature(rank).parameters[option]
    assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
    section = {field.name: field.default for field in dataclasses.fields(Rank)}
    assert parameter.default == section[option] == COMMITTED["rank"][option]


def test_every_name_that_is_offered_has_a_method():
    assert set(AGGREGATIONS) == set(AGGREGATE) and set(DEPTH_METHODS) == set(METHODS)
