"""`python -m tasks.commands.check`: says that params.yaml is valid, or in one line what to change."""

import os
import subprocess
import sys

import pytest

from tests.support.committed_params import ROOT, put, write
from tests.support.stages import check_parameters


def test_the_committed_parameters_are_valid(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    check_parameters()
    assert capsys.readouterr().out == "params.yaml is valid\n"


@pytest.mark.parametrize("table", [None, "nowhere.json"])
def test_a_missing_table_is_refused_whatever_budgets_are_counted_in(values, tmp_path, monkeypatch, table):
    """dvc.yaml names it, and what DVC says of a file that has no name helps nobody."""
    put("cost", "table", table)(values)
    write(values, tmp_path, monkeypatch)
    with pytest.raises(SystemExit, match=rf"^error: params\.yaml\.cost\.table: got {table!r}; allowed: a file that"):
        check_parameters()


def test_the_process_ends_with_one_line_and_a_status(values, tmp_path, monkeypatch):
    put("budgets", "small", "9B")(values)
    write(values, tmp_path, monkeypatch)
    command, variables = [sys.executable, "-m", "tasks.commands.check"], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: params.yaml: budgets.small: got '9B'; allowed: up to the parent's own")
