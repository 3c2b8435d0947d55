"""Progress of work that is not training: lines by a clock of the test's own, a bar on a real pseudo-terminal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.progress import bars
from tasks.progress.bars import Bars, progress_bar
from tests.support.pipeline.terminal import Terminal

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def seconds(monkeypatch):
    """A clock for tqdm: the number in the list."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_quick_work_says_nothing(seconds, capsys):
    with progress_bar("tokenizer", 100, "char") as bar:
        for _ in range(100):
            bar.update()
            seconds[0] += 0.0999
    assert capsys.readouterr() == ("", "")


def test_a_line_comes_every_ten_seconds_and_none_at_the_end(seconds, capsys):
    with progress_bar("evaluate small", 6, "model") as bar:
        for done in range(1, 7):
            seconds[0] += 4
            bar.update()
            shown = capsys.readouterr().out.splitlines()
            assert len(shown) == (1 if done in (3, 6) else 0), done
            if shown:
                assert shown[0].startswith("evaluate small: ") and f"| {done}/6 [00:{4 * done:02}<" in shown[0]
                assert "model" in shown[0] and "\r" not in shown[0]
        seconds[0] += 100
    assert capsys.readouterr() == ("", "")


def test_work_that_breaks_off_says_nothing_more(seconds, capsys):
    with pytest.raises(KeyError), progress_bar("prose", 6, "char") as bar:
        seconds[0] += 11
        bar.update(2)
        seconds[0] += 11
        raise KeyError
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and "2/6" in out and err == ""


def test_the_interval_is_a_constant_of_the_module(seconds, capsys, monkeypatch):
    monkeypatch.setattr(bars, "LOG_SECONDS", 1.0)
    with progress_bar("prose", 3, "char") as bar:
        for _ in range(3):
            seconds[0] += 1.5
            bar.update()
    assert capsys.readouterr().out.count("\n") == 3


def test_large_numbers_are_scaled(seconds, capsys):
    with progress_bar("prose", 4_600_000, "char", scaled=True) as bar:
        seconds[0] += 20
        bar.update(1_200_000)
    assert "| 1.20M/4.60M [" in capsys.readouterr().out


def test_a_bar_on_a_terminal_is_gone_at_the_end(capsys):
    terminal = Terminal(80)
    with terminal, progress_bar("rank depth", 3, "step") as bar:
        for _ in range(3):
            bar.update()
            bar.refresh()
    assert terminal.frames and all(frame.startswith("rank depth: ") for frame in terminal.frames)
    assert any("3/3" in frame for frame in terminal.frames)
    assert terminal.text.endswith("\r" + " " * len(terminal.frames[-1]) + "\r")  # blanks over the last of it
    assert capsys.readouterr().out == ""


def test_bars_are_there_where_those_of_libraries_are_off(tmp_path):
    """As in a stage: the variable is read when tqdm is imported."""
    code = (
        "from tasks.progress import bars; bars.LOG_SECONDS = 0.0\n"
        "with bars.progress_bar('rank', 2, 'step') as bar: bar.update(); bar.update()"
    )
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1/2" in done.stdout and "2/2" in done.stdout


def test_bars_by_name(seconds, capsys):
    shown = Bars("train_short", "pass")
    for what in ("candidates of medium", "candidates of small"):
        for done in range(1, 4):
            seconds[0] += 11
            shown.show(what, done, 3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["candidates of medium"] * 2 + ["candidates of small"] * 2
    assert "| 3/3 [" in lines[1] and "pass" in lines[1] and shown.bars == {}
