"""The key of a run, and when a stage starts from the start."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("dvc")

from dvc.repo.experiments.executor.base import BaseExecutor
from dvc.repo.experiments.refs import EXEC_MERGE

from elastic_core.errors import UserError
from tasks.runs import from_the_start
from tasks.runs.from_the_start import dvc_arguments
from tasks.runs.key import Inputs, committed_inputs, read_inputs

STAGES = {
    "make": {"cmd": "cat input > made", "deps": ["code", "input"], "outs": ["made"], "params": ["rate"]},
    "each": {"foreach": ["a", "b"], "do": {"cmd": "cat made > ${item}", "deps": ["made"], "outs": ["${item}"]}},
}
STAGES["make"]["params"] = ["rate", {"artifacts/inputs/libraries.json": ["torch"]}]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A DVC workspace with two stages; returns what runs DVC in it."""
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], check=True)
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
    Path("params.yaml").write_text("rate: 1\nother: 1\n")
    Path("input").write_text("words")
    Path("code/__pycache__").mkdir(parents=True)
    Path("code/step.py").write_text("1")
    Path(".dvcignore").write_text("__pycache__\n")
    Path("artifacts/inputs").mkdir(parents=True)
    Path("artifacts/inputs/libraries.json").write_text('{"torch": "2.13.0", "numpy": "2.4"}')

    def repro(*arguments):
        subprocess.run([sys.executable, "-m", "dvc", "repro", "-q", *arguments], check=True)

    return repro


def test_the_key_covers_what_dvc_yaml_lists_and_nothing_else(workspace):
    inputs = read_inputs("make")
    assert inputs.parameters == {"rate": 1} and inputs.libraries == {"torch": "2.13.0"}
    assert set(inputs.files) == {"code", "input"}
    keys = {inputs.key}
    for path, old, new in (
        ("params.yaml", "rate: 1", "rate: 2"),
        ("artifacts/inputs/libraries.json", "2.13.0", "2.14.0"),
        ("code/step.py", "1", "2"),
        ("input", "words", "other"),
    ):
        text = Path(path).read_text()
        Path(path).write_text(text.replace(old, new))
        keys.add(read_inputs("make").key)
        Path(path).write_text(text)
    assert len(keys) == 5 and read_inputs("make") == inputs
    Path("params.yaml").write_text("rate: 1\nother: 2\n")
    Path("artifacts/inputs/libraries.json").write_text('{"torch": "2.13.0", "numpy": "3"}')
    Path("code/__pycache__/step.pyc").write_text("compiled")
    assert read_inputs("make").key == inputs.key


def test_what_dvc_has_is_known_by_the_same_key(workspace):
    assert committed_inputs("make") is None
    workspace()
    assert committed_inputs("make") == read_inputs("make")
    assert committed_inputs("each@a") == read_inputs("each@a") != committed_inputs("each@b").parameters
    Path("input").write_text("other")
    assert committed_inputs("make") != read_inputs("make")
    shutil.rmtree(".dvc/cache")
    assert committed_inputs("make") is None


def test_what_differs_is_said(workspace):
    first = Inputs({"rate": 1, "same": 0}, {"torch": "2.13"}, {"code": "a", "data": "b"})
    other = dataclasses.replace(first, parameters={"rate": 2, "same": 0}, files={"code": "c", "data": "b"})
    assert first.differences(other) == ["rate: 1, now 2", "code"]


def test_an_unknown_stage_is_said(workspace):
    with pytest.raises(UserError, match=r"^stage nothing: DVC cannot read it from dvc.yaml: Stage 'nothing' not found"):
        read_inputs("nothing")


@pytest.mark.parametrize(
    "command, forced",
    [
        ("python -m dvc repro -f train_short", True),
        ("/venv/bin/python /venv/bin/dvc repro -sf train_short", True),
        ("dvc exp run --force", True),
        ("dvc repro --single-item train_short", False),
        ("dvc exp run -S f=1", False),
        ("dvc exp run --set-param train.lr=1 --name f", False),
        ("python -m pytest -f", False),
    ],
)
def test_a_forced_dvc_is_seen(command, forced, monkeypatch):
    class Process:
        def __init__(self, *_):
            pass

        def parents(self):
            return [self]

        def cmdline(self):
            return command.split()

    monkeypatch.setenv("DVC_STAGE", "train_short")
    monkeypatch.setattr(from_the_start.psutil, "Process", Process)
    assert from_the_start.is_wanted() == forced
    monkeypatch.setenv(from_the_start.VARIABLE, "1")
    assert from_the_start.is_wanted()


@pytest.mark.parametrize("forced", [True, False, None])
def test_a_queued_experiment_knows_whether_it_was_forced(forced, tmp_path, monkeypatch):
    class Worker:
        def parents(self):
            return [self]

        def cmdline(self):
            return ["/venv/bin/python", "/venv/bin/dvc", "exp", "exec-run", "--infofile", "a.run"]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "train_short")
    monkeypatch.delenv(from_the_start.VARIABLE, raising=False)
    monkeypatch.setattr(from_the_start.psutil, "Process", Worker)
    git("init", "-q")
    if forced is None:
        with pytest.raises(UserError, match=r"was queued, and DVC's options .* cannot be read.*dvc exp run --temp"):
            from_the_start.is_wanted()
        return
    path = tmp_path / ".dvc/tmp" / BaseExecutor.PACKED_ARGS_FILE  # as DVC stashes an experiment
    BaseExecutor.pack_repro_args(str(path), force=forced, targets=["train_short"])
    git("add", "-f", ".dvc/tmp")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "queued")
    git("update-ref", EXEC_MERGE, "HEAD")
    git("rm", "-q", "-r", ".dvc")  # DVC removes the file before it runs the stages
    assert from_the_start.is_wanted() == forced


def git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], check=True)


def test_only_dvc_has_arguments():
    assert dvc_arguments(["python", "train.py", "x", "dvc"]) == []
