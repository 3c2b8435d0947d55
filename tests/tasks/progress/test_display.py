"""Progress as a user sees it: lines by a clock of the test's own, a bar on a real pseudo-terminal, rows in files."""

import json
import math
import os
import re
import time
from pathlib import Path

import pytest

from tasks.progress import display
from tasks.progress.display import Recorder, followed
from tasks.progress.metrics_file import drop_cut_off_line, read_rows
from tasks.reporting import tables
from tests.support.pipeline.metric_rows import NAN, row, stage
from tests.support.pipeline.terminal import Terminal


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run(tmp_path):
    """Where a run keeps its rows: a directory named by its key."""
    return tmp_path / "checkpoints" / "train_short-0123456789abcdef" / "metrics.jsonl"


def lines_of(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if ": step" in line]


# --- lines -----------------------------------------------------------------------------------------------------------


def test_lines_come_at_once_then_every_ten_seconds_and_at_the_end(run, capsys):
    clock = Clock()
    with Recorder("train_short", stage(steps=12), run, clock=clock) as recorder:
        assert capsys.readouterr().out == ""
        clock.now += 500  # the first step compiles
        recorder.show(row(1))
        (first,) = lines_of(capsys)
        assert first == (
            "train_short: step 1/12, 40/480 tokens, soft, loss/KL full 2.000/0.500, budget error 1.3%, 3.00 GiB"
        )
        for step in range(2, 13):
            clock.now += 2
            recorder.show(row(step))
        lines = lines_of(capsys)
        assert [int(re.search(r"step (\d+)", line)[1]) for line in lines] == [6, 11]
        assert lines[0].startswith(
            "train_short: step 6/12, 240/480 tokens, 20 tokens/s, 12 s left, soft, loss/KL full 2.000"
        )
    (last,) = lines_of(capsys)
    assert last.startswith("train_short: step 12/12, 480/480 tokens, 20 tokens/s, 0 s left")


def test_the_last_line_comes_once_and_also_where_a_run_breaks_off(run, capsys):
    with Recorder("s", stage(steps=1), run, clock=Clock()) as recorder:
        recorder.show(row(1))
    assert len(lines_of(capsys)) == 1
    with pytest.raises(KeyboardInterrupt), Recorder("s", stage(), run, clock=Clock()) as recorder:
        recorder.show(row(2))
        recorder.show(row(3))
        raise KeyboardInterrupt
    assert [line[:14] for line in lines_of(capsys)] == ["s: step 2/1000", "s: step 3/1000"]


def test_the_rate_is_of_this_process_and_of_late(run):
    clock = Clock()
    with Recorder("s", stage(), run, clock=clock) as recorder:  # resumed at step 500
        clock.now += 300
        for step in range(501, 651):
            recorder.show(row(step))
            clock.now += 10 if step < 550 else 1
    rows = read_rows(run)
    assert rows[0]["tokens_per_second"] is None and rows[0]["seconds_left"] is None
    assert rows[1]["tokens_per_second"] == rows[40]["tokens_per_second"] == 4.0
    assert rows[1]["seconds_left"] == (1000 - 502) * 10
    assert rows[-1]["tokens_per_second"] == 40.0  # nothing is left of the slow steps
    assert rows[-1]["seconds_left"] == 350


def test_the_rate_of_quick_steps_is_a_mean_over_a_minute(run):
    clock = Clock()
    with Recorder("s", stage(steps=4000), run, clock=clock) as recorder:
        for step in range(1, 2001):
            recorder.show(row(step))
            clock.now += 0.25 if step % 2 else 0.05  # budgets of different cost
    assert read_rows(run)[-1]["tokens_per_second"] == pytest.approx(40 / 0.15, rel=2e-3)


def test_the_rate_starts_afresh_when_the_mode_changes(run):
    clock = Clock()
    with Recorder("s", stage(), run, clock=clock) as recorder:
        for step in range(1, 13):
            recorder.show(row(step, mode="soft" if step <= 10 else "hard"))
            clock.now += 4 if step < 10 else (100 if step == 10 else 1)
    rates = [r["tokens_per_second"] for r in read_rows(run)]
    assert rates[9:] == [10.0, 10.0, 40.0]  # the first sliced step, slow, counts nowhere


def test_a_clock_that_stands_still_gives_no_rate(run):
    with Recorder("s", stage(), run, clock=Clock()) as recorder:
        recorder.show(row(1))
        recorder.show(row(2))
    assert [r["tokens_per_second"] for r in read_rows(run)] == [None, None]


def test_losses_are_smoothed_per_budget_and_the_worst_budget_error_is_told(run, capsys):
    clock = Clock()
    with Recorder("s", stage(), run, clock=clock) as recorder:
        for step, values in enumerate([("full", 2.0, 0.5, 0.0), ("small", 4.0, 1.0, 0.2), ("full", 3.0, 1.5, 0.0)], 1):
            budget, loss, kl, error = values
            recorder.show(row(step, budget=budget, loss=loss, kl=kl, error=error, skipped=2))
            clock.now += 10
    line = lines_of(capsys)[-1]
    assert line.endswith("soft, loss/KL full 2.100/0.600, small 4.000/1.000, 2 skipped, budget error 20.0%, 3.00 GiB")


def test_budgets_are_told_in_the_order_of_the_stage(run, capsys):
    shares = {"full": 0.5, "medium": 0.0, "small": 0.5}
    with Recorder("s", stage(budget_shares=shares), run, clock=Clock()) as recorder:
        recorder.show(row(1, budget="small"))
    (line,) = lines_of(capsys)
    assert "soft, loss/KL full –/–, small 2.000/0.500, budget error" in line


# --- a terminal ------------------------------------------------------------------------------------------------------


def test_the_bar_of_a_resumed_run(run, capsys):
    terminal, start = Terminal(100), time.monotonic()
    with terminal, Recorder("train_short", stage(), run) as recorder:
        time.sleep(0.5)  # a slow first step
        for step in range(501, 521):
            recorder.show(row(step, loss=NAN if step == 505 else 2.0, skipped=int(step >= 505)))
            time.sleep(0.05)
    elapsed, frames = time.monotonic() - start, terminal.frames
    assert lines_of(capsys) == []
    assert len(frames) >= 10 and all(len(frame) <= 100 for frame in frames)
    assert re.match(r"train_short:  50%\|█+ +\| 20\.0k/40\.0k \[", frames[0])
    assert frames[1] == "soft, loss/KL full 2.000/0.500, budget error 1.3%, 3.00 GiB"
    assert frames[-2] == "soft, loss/KL full 2.000/0.500, 1 skipped, budget error 1.3%, 3.00 GiB"
    pattern = r"train_short:  52%\|█.*\| 20\.8k/40\.0k \[00:0\d<(\d\d):(\d\d), ([\d.]+)(k?) tokens/s\]"
    minutes, seconds, rate, kilo = re.fullmatch(pattern, frames[-1]).groups()
    rate = float(rate) * (1000 if kilo else 1)
    left = 60 * int(minutes) + int(seconds)
    assert 19 * 40 / elapsed < rate <= 40 / 0.05  # as fast as the steps, not as with the slow first one
    assert left == pytest.approx(19200 / rate, abs=5)


def test_a_narrow_terminal_is_kept_to(run):
    terminal = Terminal(60)
    with terminal, Recorder("train_short", stage(steps=3), run) as recorder:
        for step, budget in enumerate(("full", "medium", "small"), 1):
            recorder.show(row(step, budget=budget))
    assert all(len(frame) <= 60 for frame in terminal.frames)
    assert terminal.frames[-2].startswith("soft, loss/KL full 2.000/0.500, medium") and "100%" in terminal.frames[-1]


def test_rows_of_another_process_move_the_bar_here(run, capsys, monkeypatch):
    """What a killed run left is not shown again; a line that is still being written waits for its end."""
    monkeypatch.setattr(display, "FOLLOW_SECONDS", 0.1)
    with Recorder("train_short", stage(steps=8), run, display=False) as recorder:
        recorder.show(row(1))
        recorder.show(row(2))
    terminal = Terminal(100)
    with terminal, followed("train_short", stage(steps=8), run):
        with Recorder("train_short", stage(steps=8), run, display=False) as recorder:
            for step in range(3, 8):
                recorder.show(row(step, loss=float(step)))
                time.sleep(0.06)
        line = json.dumps(row(8, loss=8.0) | {"tokens_per_second": 100.0, "seconds_left": 0.0}) + "\n"
        for part in (line[:40], line[40:]):
            with open(run, "a") as file:
                file.write(part)
            time.sleep(0.25)
    assert lines_of(capsys) == []
    assert "loss/KL full 3.000" in terminal.frames[1]  # the first row of this process
    assert "100%" in terminal.frames[-1] and "320/320" in terminal.frames[-1]


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_and_every_step_is_there_once(run, tmp_path):
    recorder = Recorder("s", stage(steps=6), run).__enter__()
    for step in range(1, 5):
        recorder.show(row(step, loss=9.0))
    assert [r["step"] for r in read_rows(run)] == [1, 2, 3, 4]  # there at once, without closing
    with open(run, "a") as file:
        file.write('{"step": 5, "tok')
    assert [r["step"] for r in read_rows(run)] == [1, 2, 3, 4]
    with Recorder("s", stage(steps=6), run) as recorder:  # from the checkpoint of step 2
        for step in range(3, 7):
            recorder.show(row(step, loss=1.0))
        recorder.finish(tmp_path / "out" / "inside.jsonl")
    recorder.finish(tmp_path / "out" / "metrics.jsonl")
    out = (tmp_path / "out" / "metrics.jsonl").read_text()
    assert out == (tmp_path / "out" / "inside.jsonl").read_text()
    assert sorted(os.listdir(tmp_path / "out")) == ["inside.jsonl", "metrics.jsonl"]
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(r["step"], r["budgets"]["full"]["loss"]) for r in rows] == [
        *[(1, 9.0), (2, 9.0)],
        *[(step, 1.0) for step in range(3, 7)],
    ]
    assert rows[3]["tokens_per_second"] > 0 and rows[-1]["seconds_left"] == 0


def test_only_a_run_that_goes_on_from_a_checkpoint_tells_so(run, tmp_path, monkeypatch):
    """A killed run without a checkpoint has rows, but starts from the beginning."""
    monkeypatch.setenv("ELASTIC_EVENTS", str(tmp_path / "events"))
    for first in (1, 1, 3):
        with Recorder("s", stage(steps=4), run) as recorder:
            for step in range(first, 5):
                recorder.show(row(step))
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert [event["event"] for event in events] == ["training", "training", "training", "resumed"]
    assert events[-1] == {"event": "resumed", "name": "s", "step": 2}


def test_a_run_that_was_at_its_end_already(run, tmp_path):
    with Recorder("s", stage(steps=1), run) as recorder:
        recorder.show(row(1))
    with Recorder("s", stage(steps=1), run) as recorder:
        pass
    recorder.finish(tmp_path / "metrics.jsonl")
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1
    with Recorder("s", stage(steps=1), run.with_name("other.jsonl")) as recorder:
        pass
    recorder.finish(tmp_path / "metrics.jsonl")
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("content, kept", [("", ""), ('{"a', ""), ('{"a": 1}\n', '{"a": 1}\n'), ("x\ny\nz", "x\ny\n")])
def test_a_cut_off_line_is_dropped(tmp_path, content, kept):
    path = tmp_path / "rows"
    drop_cut_off_line(path)  # not there: nothing to do
    path.write_text(content)
    drop_cut_off_line(path)
    assert path.read_text() == kept


def test_numbers_that_are_not_finite_or_not_there_break_nothing(run, tmp_path, capsys):
    """A skipped step's loss may be NaN; a budget without a teacher has no KL."""
    clock = Clock()
    with Recorder("s", stage(steps=3), run, clock=clock) as recorder:
        recorder.show(row(1, loss=NAN, kl=NAN, error=math.inf, grad_norm=math.inf, skipped=1))
        clock.now += 10
        recorder.show(
            row(2, kl=None, error=None, memory_bytes=None, grad_norm=None, learning_rate=None, budget="small")
        )
        clock.now += 10
        bare = {"step": 3, "tokens": 120, "mode": "hard", "budgets": {"full": {"loss": 1.0}}, "microbatches": []}
        recorder.show(bare)
    first, second, third = lines_of(capsys)
    assert first.endswith("soft, loss/KL full –/–, 1 skipped, 3.00 GiB")
    assert second.endswith("soft, loss/KL full –/–, small 2.000/–")
    assert third.endswith("hard, loss/KL full 1.000/–, small 2.000/–")
    recorder.finish(tmp_path / "metrics.jsonl")

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    for path in (run, tmp_path / "metrics.jsonl"):
        rows = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
        assert rows[0]["budgets"]["full"] == {"loss": None, "ce": None, "kl": None, "budget_error": None}
        assert rows[0]["microbatches"][0]["loss"] is None and rows[0]["grad_norm"] is None


def test_the_tables_read_rows_with_nulls(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, loss in (("parent_metrics.jsonl", 2.0), ("train_short/metrics.jsonl", NAN)):
        with Recorder("s", stage(steps=4), run.with_name(name.replace("/", "_"))) as recorder:
            for step in range(1, 5):
                recorder.show(row(step, loss=NAN if step == 2 else loss))
        recorder.finish(Path("artifacts") / name)
    (tmp_path / "artifacts" / "train_extended").mkdir()
    (tmp_path / "artifacts" / "train_extended" / "metrics.jsonl").write_text("")
    curves = tables.training()
    parent = curves[curves.stage == "parent"]
    assert list(parent.tokens) == [40, 80, 120, 160] and parent.loss.dropna().tolist() == [2.0, 2.0, 2.0]
    assert curves[curves.stage == "train_short"].loss.isna().all()
