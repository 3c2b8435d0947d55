"""A stage whose inputs change while it runs fails: DVC would record its results as those of the new inputs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("dvc")

from elastic_core.errors import UserError
from tasks.runs.job import started
from tasks.runs.unchanged import KEY, inputs_unchanged

ROOT = Path(__file__).resolve().parents[3]
STAGE = {"cmd": "python stage.py", "deps": ["code", "input"], "outs": ["made"], "params": ["rate"]}
# A stage of the test's own, in the place of a file in tasks/. Meanwhile its user edits params.yaml.
PROCESS = """
import pathlib, sys, types
trial = types.ModuleType("tasks.trial")
def main():
    pathlib.Path("made").write_text("of rate 1")
    pathlib.Path("params.yaml").write_text("rate: 2")
trial.main = main
sys.modules["tasks.trial"] = trial
sys.argv[1:] = ["trial"]
from tasks.__main__ import main
main()
"""


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A DVC workspace with one stage."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(KEY, "")
    monkeypatch.delenv(KEY)  # and again after the test
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    for name, text in {
        "dvc.yaml": yaml.safe_dump({"stages": {"make": STAGE}}),
        ".dvcignore": "__pycache__\n",
        "params.yaml": "rate: 1\nother: 1\n",
        "input": "words",
        "code/step.py": "1",
        "stage.py": PROCESS,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def write(name, text):
    return lambda: (Path(name).parent.mkdir(exist_ok=True), Path(name).write_text(text))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (write("params.yaml", "rate: 2"), r"changed while it ran: rate: 1, now 2; .*start again"),
        (write("params.yaml", "rate: ["), r"DVC cannot read it"),
        (write("input", "other"), r": input;"),
        (write("code/new.py", "2"), r": code;"),
        (lambda: Path("input").unlink(), r"input"),
        (lambda: shutil.rmtree("code"), r"code"),
        (write("dvc.yaml", "stages: {}"), r"Stage 'make' not found"),
        (write("params.yaml", "rate: 1\nother: 2\n"), None),
        (write("code/__pycache__/step.pyc", "compiled"), None),
        (write("made", "what the stage writes itself"), None),
    ],
)
def test_a_change_of_inputs_fails_the_stage(workspace, change, words):
    with inputs_unchanged(None):  # not started by DVC
        pass
    if words is None:
        with inputs_unchanged("make"):
            change()
        return
    with pytest.raises(UserError, match=words), inputs_unchanged("make"):
        change()


def test_a_stage_that_fails_says_why_and_nothing_else(workspace):
    with pytest.raises(KeyError), inputs_unchanged("make"):
        Path("input").write_text("other")
        raise KeyError


def test_a_run_has_the_key_of_what_the_process_has_read(workspace):
    with inputs_unchanged("make"), started("make"):
        pass
    with pytest.raises(UserError, match="changed while it began; start again"), inputs_unchanged("make"):
        Path("params.yaml").write_text("rate: 2")
        with started("make"):
            raise AssertionError
    assert [path.name for path in Path("checkpoints").glob("*/lease-*")] == []


def test_dvc_records_nothing_of_a_stage_whose_parameters_were_edited(workspace):
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dvc", "repro", "-q"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "error: make: its inputs changed while it ran: rate: 1, now 2; " in done.stderr
    assert Path("made").exists() and not Path("dvc.lock").exists()
