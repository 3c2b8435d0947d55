"""`python -m tasks.commands.check`: says that params.yaml is valid, or in one line what to change."""

import runpy

import pytest

from tests.support.committed_params import ROOT, put, write
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
