"""Arguments that cannot be: one message, status 1 or 2, and nothing is written."""

import subprocess

import pytest
from typer.testing import CliRunner

from elastic_core.errors import UserError
from flows.cli.app import app
from tasks.commands import check

FORMS = ("x", "=1", "a=", "a..b=1", ".a=1", "a.=1", "1a=1", "a b=1", "a=[1", "a={b: 1, b: 2}", "a=\t- x", "a=!!x [")
VALUES = ("cost=3", "budgets=[1]", "budgets={}", "train_short=null", "train_short.steps=ten", "prepare_data.sources=3")
VALUES += ("parent.path=5", "parent.path=nowhere", "choices.depth=[99]", "evaluate.benchmarks=3", "nothing=1")
VALUES += ("cost.table=nowhere.json", "compute.storage=3", "prepare_data.sources={m: {kind: files, path: 'no/*'}}")
BUDGETS = (["a"], ["a=x"], ["=0.5"], ["a b=0.5"], ["a=0.5", "a=0.4"], ["a=1.2.3"], ["a=99"])
# `elastic run` checks values in a process, by `python -m tasks.commands.check`: one of each option here, all below.
CHECKED = (["a=0.5", "b=0.5"], ["parent=1.0"], ["a=1.0", "b=9B"], ["a=3GiB@1k"], ["a=5ms/token"])
CASES = [("run", "--set", value) for value in (*FORMS, VALUES[0])] + [("run", "--budget", *CHECKED[1])]
CASES += [("plan", "--set", value) for value in (*FORMS, *VALUES[:9])]
CASES += [("run", *(f"--budget={budget}" for budget in budgets)) for budgets in BUDGETS]
CASES += [("run", option, "nothing") for option in ("--from", "--until", "--only")]
CASES += [("run", "--from", "rank", "--until", "parent"), ("run", "nothing"), ("plan", "nothing"), ("run", "--nothing")]
CASES += [("run", ""), ("run", "../params"), ("run", "smoke", "smoke"), ("init",), ("init", "nowhere")]
CASES += [("plan", "--gpus", "0"), ("plan", "--gpus", "x"), ("plan", "--gpu-memory", "much"), ("plan", "--peak", "-1")]
CASES += [("plan", "--utilisation", value) for value in ("0", "2", "nan")]
CASES += [
    ("plan", "--config", "nowhere"),
    ("measure",),
    ("measure", "nothing"),
    ("measure", "smoke", "--set", "cost=3"),
]
CASES += [
    ("measure", "smoke", "--context", "0"),
    ("measure", "smoke", "--points", "1"),
    ("measure", "smoke", "--set", ""),
]


@pytest.fixture(scope="module")
def tracked():
    """What git says of the checkout, and its runs, before all cases."""
    return state()


def state():
    from tasks.settings.merging import ROOT

    status = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    runs = ROOT / ".runs"
    return status.stdout, sorted(path.name for path in runs.iterdir()) if runs.is_dir() else []


@pytest.mark.parametrize(
    "arguments",
    [[f"--set={value}"] for value in VALUES] + [[f"--budget={budget}" for budget in budgets] for budgets in CHECKED],
    ids=" ".join,
)
def test_what_run_checks_is_refused(arguments, tracked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        check.main(arguments)
    assert state() == tracked and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", CASES, ids=" ".join)
def test_one_message_and_nothing_written(arguments, tracked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.stderr and result.stderr.strip()
    if result.exit_code == 1:
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") <= 3
    assert state() == tracked and not list(tmp_path.iterdir())
