"""`make interop` without other programs: its cases, what counts as equal, and the table in the docs."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.interop import __main__ as interop
from benchmarks.interop import environments
from benchmarks.interop.cases import CASES, NEW_TOKENS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return interop.make_case("qwen3", tmp_path_factory.mktemp("interop"))


def test_an_answer_ends_with_the_turn(case):
    """Otherwise a reader that knows no stop id would pass."""
    export, expected = case
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert 4 < len(expected["tokens"][-1]) < NEW_TOKENS and expected["tokens"][-1][-1] in expected["stop"]
    assert expected["tokens"][-1][:-1] == expected["answers"][-1]
    request = json.loads((export.parent / "request.json").read_text())
    assert tokenizer.decode(request["prompts"][-1]) == expected["chat"]


def test_a_reader_of_this_environment_is_equal(case, monkeypatch, capsys):
    """The script of other versions of transformers, run by this one."""
    export, expected = case
    monkeypatch.setattr(sys, "argv", ["reader", str(export), str(export.parent / "request.json")])
    runpy.run_path(str(interop.READERS / "transformers_reader.py"))
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert interop.compare(answer, expected) == interop.EQUAL and answer["version"]
    assert {"tokens", "chat", "texts"} < answer.keys()


def test_what_differs_is_named(case):
    expected = case[1]
    assert interop.compare(dict(expected), expected) == interop.EQUAL
    with_stop = {"answers": expected["tokens"]}
    assert interop.compare(with_stop, expected) == interop.EQUAL
    endless = {"answers": [[*ids, 9, 9] for ids in expected["tokens"]], "texts": [[1]]}
    assert interop.compare(endless, expected) == "differs: answers, texts"
    assert interop.compare({"failed": "status 1: no"}, expected) == "fails: status 1: no"
    assert interop.compare({"unsupported": "no experts"}, expected) == interop.UNSUPPORTED


def test_an_environment_has_a_place_of_its_own():
    places = {environment.directory for environment in environments.ENVIRONMENTS.values()}
    assert len(places) == len(environments.ENVIRONMENTS)
    assert not any(place.is_relative_to(ROOT) for place in places)
    readers = {path.name for path in (ROOT / "benchmarks/interop/readers").glob("*.py")}
    assert {environment.reader for environment in environments.ENVIRONMENTS.values()} == readers


def test_the_docs_have_the_table_of_the_last_results():
    found = json.loads(interop.RESULTS.read_text())
    assert interop.table(found) in (ROOT / "docs/serving.md").read_text()
    assert all(set(entry["cases"]) <= set(CASES) for entry in found.values())
