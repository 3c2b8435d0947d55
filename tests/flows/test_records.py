"""What finished runs leave, and what differs between two of them."""

import datetime
import json
from pathlib import Path

import pytest

from flows import differences, records


def write_run(root: Path, name: str, finished: str, results: list[dict], **parameters) -> Path:
    directory = root / records.NAMED / name
    directory.mkdir(parents=True)
    record = {"name": name, "profile": "default", "commit": "abc", "finished": finished}
    (directory / records.RECORD).write_text(json.dumps(record))
    (directory / "params.yaml").write_text(json.dumps(parameters))
    (directory / "results.json").write_text(json.dumps(results))
    return directory


def write_workspace(workspace: Path, loss: float) -> None:
    (workspace / "reports").mkdir(parents=True, exist_ok=True)
    (workspace / "params.yaml").write_text(f"seed: {loss}\n")
    (workspace / records.RESULTS).write_text(json.dumps([{"model": "small", "loss": loss}]))


def test_what_differs_between_two_runs(tmp_path):
    row = {"budget": "small", "model": "after stage 2", "loss": 2.0, "gap": None}
    a = write_run(tmp_path, "a", "2026-01-01", [row], seed=0, train={"steps": 10, "loss": {"kl": 1.0}})
    b = write_run(tmp_path, "b", "2026-01-02", [{**row, "loss": 1.5}], seed=0, train={"steps": 20, "new": [1]})
    rows = differences.changes(a, b)
    assert rows == [
        {"what": "parameter", "name": "train.steps", "before": 10, "after": 20, "change": "+10"},
        {"what": "parameter", "name": "train.loss.kl", "before": 1.0, "after": "–", "change": "–"},
        {"what": "parameter", "name": "train.new", "before": "–", "after": "[1]", "change": "–"},
        {"what": "result", "name": "small after stage 2: loss", "before": 2.0, "after": 1.5, "change": "-0.5"},
    ]
    assert differences.count(rows) == "3 parameters and 1 result differ"
    assert differences.as_text(rows).splitlines()[1].split() == ["parameter", "train.steps", "10", "20", "+10"]
    assert [row["name"] for row in differences.changes(a, a)] == ["nothing differs"]
    assert differences.count(differences.changes(a, a)) == "nothing differs"


def test_which_runs_are_compared(tmp_path):
    for name, finished in (("first", "2026-01-01"), ("the-third", "2026-01-03"), ("second", "2026-01-02")):
        write_run(tmp_path, name, finished, [])
    names = records.records(tmp_path)
    assert names == ["first", "second", "the-third"]
    assert records.choose(names, None, None) == ("second", "the-third")
    assert records.choose(names, "the third", None) == ("the-third", "second")  # as its user has spelled it
    assert records.choose(names, None, "second") == ("first", "second")
    with pytest.raises(ValueError, match="run: got 'fourth'; allowed: first, second, the-third"):
        records.choose(names, "fourth", None)
    with pytest.raises(ValueError, match="takes two finished runs"):
        records.choose(names[:1], None, None)


def test_a_run_of_any_name_has_a_directory_of_its_own(tmp_path):
    assert records.directory_of("../../my run", "1234567890", tmp_path) == tmp_path / "my-run"
    assert records.directory_of("..", "1234567890", tmp_path) == tmp_path / "1234567890"
    write_run(tmp_path, "mine", "2026-01-01", [])
    of_another = tmp_path / records.NAMED
    assert records.directory_of("mine", "1234567890", of_another) == of_another / "mine-12345678"


def test_a_name_has_the_profile_and_the_time():
    assert records.new_name("smoke", datetime.datetime(2026, 11, 29, 21, 43)) == "smoke 2026-11-29 21:43"
    assert records.safe_name("smoke 2026-11-29 21:43") == "smoke-2026-11-29-21-43"


def test_a_run_keeps_its_files_and_two_runs_of_a_minute_have_their_own(tmp_path):
    workspace = tmp_path / ".runs" / "smoke"
    write_workspace(workspace, 2.0)
    assert records.kept_already(workspace, tmp_path) is None
    first = records.keep("smoke 2026-11-29 21:43", "smoke", workspace, tmp_path, {"force": True, "overrides": []})
    assert first.name == "smoke-2026-11-29-21-43"
    assert {path.name for path in first.iterdir()} == {"run.json", "params.yaml", "results.json"}
    assert records.read_record(first)["parameters"] == {"force": True}
    assert records.kept_already(workspace, tmp_path) == first
    write_workspace(workspace, 1.0)
    assert records.kept_already(workspace, tmp_path) is None
    second = records.keep("smoke 2026-11-29 21:43", "smoke", workspace, tmp_path)
    assert second != first and second.name.startswith(first.name)
    names = {row["name"]: row["after"] for row in differences.changes(first, second)}
    assert names == {"seed": 1.0, "small: loss": 1.0}
