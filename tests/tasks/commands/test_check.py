"""`python -m tasks.commands.check`: says that params.yaml is valid, or in one line what to change."""

import os
import runpy
import subprocess
import sys

import pytest

from elastic_core.config import ConfigError
from tasks.commands import check
from tests.support.committed_params import ROOT, parent_directory, put, use_parent, write
from tests.support.pipeline.stages import check_parameters


def test_the_committed_parameters_are_valid(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    check_parameters()
    assert capsys.readouterr().out == "params.yaml is valid\n"


@pytest.mark.parametrize("table", [None, "nowhere.json"])
def test_a_missing_table_is_refused_whatever_budgets_are_counted_in(values, tmp_path, monkeypatch, table):
    """dvc.yaml names it, and what DVC says of a file that has no name helps nobody."""
    put("cost", "table", table)(values)
    write(values, tmp_path, monkeypatch)
    with pytest.raises(SystemExit, match=rf"^error: params\.yaml: cost\.table: got {table!r}; allowed: a file that"):
        check_parameters()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_command_ends_with_one_line_and_a_status(values, tmp_path, monkeypatch, capsys):
    """As `python -m tasks.commands.check`, but in this process, which has imported torch already."""
    put("budgets", "small", "9B")(values)
    write(values, tmp_path, monkeypatch)
    monkeypatch.setattr("sys.argv", ["check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("tasks.commands.check", run_name="__main__")
    text = ended.value.code  # Python prints it to stderr and ends with status 1
    assert text.startswith("error: params.yaml: budgets.small: got '9B'; allowed: up to the parent's own")
    assert "\n" not in text and capsys.readouterr() == ("", "")


def run_check(directory):
    """The ended process of `python -m tasks.commands.check`."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tasks.commands.check"]
    return subprocess.run(command, cwd=directory, env=variables, capture_output=True, text=True)


@pytest.fixture
def wrong(values, tmp_path, monkeypatch):
    """Parameters with a mistake of every kind that is found without the parent's configuration."""
    values["seed"] = "none"
    values["budgets"]["small"] = "70%"
    values["prepare_data"]["sources"]["mine"] = {"kind": "files", "path": "corpus/*.jsonl"}
    values["prepare_data"]["sources"]["other"] = {"kind": "files", "path": "*.pdf"}
    values["parent"] = {"path": "nowhere"}
    values["rank"]["batches"] = 0
    values["train_short"]["mixture"] = {"poems": 1.0}
    values["train_extended"]["steps"] = 0
    values["evaluate"]["benchmarks"] = {"tasks": ["mine"], "include": "nowhere"}
    values["compute"]["storage"] = "a_file/checkpoints"
    (tmp_path / "a_file").touch()
    (tmp_path / "a.pdf").touch()
    write(values, tmp_path, monkeypatch)
    return tmp_path


def test_all_problems_are_listed_in_the_order_of_the_sections_and_nothing_is_written(wrong):
    before = sorted(wrong.rglob("*"))
    done = run_check(wrong)
    assert done.returncode == 1 and done.stdout == ""
    assert sorted(wrong.rglob("*")) == before
    found = [line.removeprefix("error: params.yaml: ").split(": ")[0] for line in done.stderr.splitlines()]
    assert found == [
        "seed",
        "budgets.small",
        "prepare_data.sources.mine.path",
        "prepare_data.sources.other.path",
        "parent.path",
        "rank.batches",
        "rank.depth_batches",
        "train_short.mixture",
        "train_extended.steps",
        "evaluate.benchmarks.include",
        "compute.storage",
    ]


def problems_of(*arguments: str) -> list[str]:
    """The lines that a check in this process ends with."""
    with pytest.raises(SystemExit) as ended:
        check_parameters(*arguments)
    return ended.value.code.splitlines()


def test_checking_a_profile_writes_nothing(wrong):
    before = sorted(wrong.rglob("*"))
    assert problems_of("smoke", "--set", "seed=-1", "--budget", "a=3")
    assert sorted(wrong.rglob("*")) == before


def test_problems_start_with_the_place_of_their_parameter(monkeypatch):
    monkeypatch.chdir("/")
    stages = ["--set=train_short.steps=0", "--set=rank={batches: 0}", "--budget=a=1.0", "--budget=b=1.0"]
    lines = problems_of("smoke", "--set=evaluate.limit=0", *stages)
    assert [line.split(": ")[1:3] for line in lines] == [
        ["--budget", "budgets"],
        ["--set", "rank.batches"],
        ["--set", "rank.depth_batches"],
        ["--set", "train_short.steps"],
        ["--set", "evaluate.limit"],
    ]
    lines = problems_of("one-gpu", "--set=parent.path=/nowhere")
    assert lines[0].startswith(
        "error: profiles/one-gpu.yaml: prepare_data.sources.text.path: got '/data/corpus/*.jsonl'"
    )
    assert lines[1].startswith("error: --set: parent.path: got '/nowhere'")


@pytest.mark.parametrize("name", ["compute.storage", "artifacts"])
def test_a_place_that_cannot_be_written_is_named(values, tmp_path, monkeypatch, name):
    """Nothing can be made below a file, whoever tries."""
    (tmp_path / "artifacts").touch()
    if name == "compute.storage":
        (tmp_path / "artifacts").rename(tmp_path / "file")
        values["compute"]["storage"] = str(tmp_path / "file")
    write(values, tmp_path, monkeypatch)
    with pytest.raises(SystemExit, match=rf"^error: params\.yaml: .*{name}: .*Not a directory"):
        check_parameters()


def test_what_the_parent_cannot_give_is_listed_with_what_is_wrong_without_a_parent(values, tmp_path, monkeypatch):
    values["budgets"] |= {"medium": "9B", "small": "7B"}
    values["choices"] |= {"hidden_size": [40, 32], "depth": [99]}
    write(values, tmp_path, monkeypatch)
    with pytest.raises(ConfigError) as caught:
        check.main()
    assert keys(caught) == ["budgets.medium", "budgets.small", "choices.hidden_size", "choices.depth"]
    values["budgets"]["small"] = "70%"  # no budget is compared with the parent then
    values["prepare_data"]["sources"]["mine"] = {"kind": "files", "path": "nowhere/*.txt"}
    values["train_short"]["steps"] = 0
    values["evaluate"] = None
    values["compute"] = {"workers": "two"}
    write(values, tmp_path, monkeypatch)
    with pytest.raises(ConfigError) as caught:
        check.main()
    assert keys(caught) == [
        *("budgets.small", "choices.hidden_size", "choices.depth"),
        *("prepare_data.sources.mine.path", "train_short.steps", "evaluate", "compute.workers"),
    ]


def keys(caught) -> list[str]:
    """The parameter of each problem, in the order of the text."""
    return [problem.split(": ")[1] for problem in caught.value.problems]


def test_problems_of_every_kind_are_listed_with_a_directory_as_the_parent(values, tmp_path, monkeypatch):
    """A budget and a size do not fit its config.json, nor its weights; a step and a source are wrong for any parent."""
    directory = parent_directory(tmp_path)
    (directory / "model.safetensors").write_bytes(b"<html>")
    use_parent(values, directory)
    values["budgets"]["small"] = "9B"
    values["rank"]["mixture"] = {"poems": 1.0}
    values["train_short"]["steps"] = 0
    values["choices"]["hidden_size"] = [99]
    write(values, tmp_path, monkeypatch)
    with pytest.raises(ConfigError) as caught:
        check.main()
    assert keys(caught) == ["budgets.small", "choices.hidden_size", "parent.path", "rank.mixture", "train_short.steps"]


@pytest.mark.parametrize("arguments", [["--sett=a"], ["smoke", "smoke"], ["--budget"]])
def test_every_argument_that_is_not_known_is_a_usage_error(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        check_parameters(*arguments)
    assert ended.value.code == 2 and "usage: python -m tasks.commands.check" in capsys.readouterr().err


def test_the_check_imports_no_modeling_code_of_transformers_and_no_compiler(values, tmp_path, monkeypatch):
    """With these, it would take twice as long. What it needs are torch and one class of configurations.

    That holds for a new parent and for a directory.
    """
    (tmp_path / "new").mkdir()
    write(values, tmp_path / "new", monkeypatch)
    use_parent(values, parent_directory(tmp_path))
    write(values, tmp_path, monkeypatch)
    slow = {"transformers.modeling_utils", "transformers.activations", "torch._dynamo", "torch.distributed.tensor"}
    slow |= {"lm_eval", "datasets", "ray", "pandas", "elastic_core.training.loop", "tasks.commands.plan"}
    both = "check.main(); os.chdir('new'); check.main()"
    code = f"import os, sys; from tasks.commands import check; {both}; print({slow} & sys.modules.keys())"
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert done.stdout == 2 * "params.yaml is valid\n" + "set()\n", done.stderr
