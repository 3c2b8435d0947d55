"""Whatever stands in params.yaml or in a profile: it is valid, or every problem is a line; nothing else is raised."""

import copy
import datetime
import itertools

import pytest
from ruamel.yaml import YAML

from elastic_core.config import ConfigError, Problems
from elastic_core.errors import UserError
from tasks.settings.load import read, read_sections
from tasks.settings.local_checks import BEFORE_A_RUN, check_local
from tasks.settings.merging import parameters
from tests.support.committed_params import COMMITTED, ROOT

OTHERS = (None, True, -3, 10**400, float("nan"), "text", [], ["a", None], {1: 2}, datetime.date(2026, 1, 2), [[]])
OPENED = ("cost", "parent", "prepare_data", "evaluate", "compute")  # sections with paths
BASE = copy.deepcopy(COMMITTED)
BASE["prepare_data"]["sources"]["mine"] = {"kind": "files", "path": "corpus/*.txt", "text_field": "text"}
BASE["evaluate"]["benchmarks"] = {"tasks": ["piqa"], "include": None, "data_root": ".", "limit": 5}
BASE["evaluate"]["benchmarks"] |= {
    **{"apply_chat_template": True, "system_instruction": "Be brief.", "fewshot_as_multiturn": True, "stop": ["Q:"]},
    **{"gen_kwargs": {"temperature": 0.5}, "think_end_token": "</think>", "enable_thinking": True},
}
BASE["untrained"] = {"compact": 0.57}
BASE["train_short"]["loss_by_budget"] = {"full": {"ce_weight": 1.0}}


def paths_of(values, path=()):
    """The path of every value, sections and lists included."""
    yield path
    if isinstance(values, dict):
        for key, value in values.items():
            yield from paths_of(value, (*path, key))


def changed(path, value, values=BASE):
    """A copy with another value at a path."""
    if not path:
        return value
    return {**values, path[0]: changed(path[1:], value, values[path[0]])}


PATHS = [path for path in paths_of(BASE) if path]


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_a_wrong_value_is_a_sentence(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for value in OTHERS:
        values = changed(path, value)
        try:
            read(values)
        except ConfigError as error:
            assert all(problem.startswith("params.yaml: ") for problem in error.problems)
        problems = Problems()
        sections = read_sections(problems, values)
        if path[0] in OPENED:
            check_local(problems, sections, BEFORE_A_RUN)
        assert all(": " in problem and "\n" not in problem for problem in problems.found)


def test_two_wrong_values_are_two_problems():
    """In every pair of neighbouring parameters; a list of lists is right for none of them."""
    for one, other in itertools.pairwise(path for path in PATHS if len(path) == 2 and path != ("parent", "path")):
        with pytest.raises(ConfigError) as caught:
            read(changed(one, [[]], changed(other, [[]])))
        for path in (one, other):
            key = f"params.yaml: {'.'.join(path)}"
            assert any(problem.startswith(key) for problem in caught.value.problems)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    return tmp_path


@pytest.mark.parametrize("value", [3, "text", [1], {"a": [1]}], ids=str)
def test_a_profile_with_a_wrong_section_is_merged_or_refused(root, value):
    sections = [*BASE, "prepare_data.sources", "parent.training", "train_short.budget_shares", "evaluate.tasks"]
    for section in sections:
        own = value
        for key in reversed(section.split(".")):
            own = {key: own}
        YAML(typ="safe").dump(own, root / "profiles" / "own.yaml")
        with pytest.raises(UserError):
            read(parameters("own", root, {"full": 1.0, "other": 0.5}, [f"{section}.key=3", "report=1"]))
