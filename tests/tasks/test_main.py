"""`python -m tasks STAGE`: what every stage's process says, and how it ends."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A stage of the test's own, in the place of a file in tasks/.
STAGE = """
import sys, types
trial = types.ModuleType("tasks.trial")
exec(sys.argv.pop(1), vars(trial))
sys.modules["tasks.trial"] = trial
from tasks.__main__ import main
main()
"""
GOOD = "def main(*arguments): print('at work', *arguments)"
LOST = """
from tasks.runtime.exit_status import StageInterrupted
def main(*arguments): raise StageInterrupted("workers were lost")
"""
WRONG = """
from elastic_core.errors import UserError
def main(*arguments): raise UserError("seed: got -1; allowed: 0 or more")
"""
MISTAKE = "def main(*arguments): return {}['key']"
EXITS = "import sys\ndef main(*arguments): sys.exit(3)"


def run(command, directory, **variables):
    """The ended process of `command`, and the events that it told."""
    kept = {name: value for name, value in os.environ.items() if name not in ("ELASTIC_EVENTS", "DVC_STAGE")}
    events = directory / "events"
    done = subprocess.run(
        [sys.executable, *command],
        cwd=directory,
        env={**kept, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
    )
    return done, [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []


@pytest.mark.parametrize(
    ("stage", "status", "error"),
    [
        (GOOD, 0, ""),
        (LOST, os.EX_TEMPFAIL, "error: workers were lost\n"),
        (WRONG, 1, "error: seed: got -1; allowed: 0 or more\n"),
        (EXITS, 3, ""),
    ],
    ids=["good", "lost", "wrong", "exits"],
)
def test_a_stage_ends_with_a_status_a_line_and_an_event(tmp_path, stage, status, error):
    command = ["-c", STAGE, stage, "trial", "small"]
    done, events = run(command, tmp_path, ELASTIC_EVENTS=str(tmp_path / "events"))
    assert (done.returncode, done.stderr) == (status, error)
    begin, *middle, end = done.stdout.splitlines()
    assert begin == "trial small …" and middle == (["at work small"] if status == 0 else [])
    how = "done" if status == 0 else f"ended with status {status}"
    assert re.fullmatch(rf"trial small: {how} after \d+ s", end)
    name = "trial small"
    assert events == [{"event": "begin", "stage": name}, {"event": "end", "stage": name, "status": status}]


def test_a_mistake_keeps_its_traceback(tmp_path):
    command = ["-c", STAGE, MISTAKE, "trial"]
    done, events = run(command, tmp_path, ELASTIC_EVENTS=str(tmp_path / "events"))
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and "KeyError: 'key'" in done.stderr
    assert done.stdout.splitlines()[-1].startswith("trial: ended with status 1 after ")
    assert events[-1] == {"event": "end", "stage": "trial", "status": 1}


def test_without_a_reader_of_events_there_is_no_line_at_the_beginning(tmp_path):
    done, events = run(["-c", STAGE, GOOD, "trial"], tmp_path)
    first, last = done.stdout.splitlines()
    assert first == "at work" and last.startswith("trial: done after ")
    assert events == [] and list(tmp_path.iterdir()) == []


def test_events_have_the_name_that_dvc_gives_the_stage(tmp_path):
    variables = {"ELASTIC_EVENTS": str(tmp_path / "events"), "DVC_STAGE": "extract@small"}
    done, events = run(["-c", STAGE, GOOD, "trial", "small"], tmp_path, **variables)
    assert done.stdout.splitlines()[0] == "trial small …"
    assert [event["stage"] for event in events] == ["extract@small"] * 2


def test_a_real_stage_that_cannot_begin(tmp_path):
    done, events = run(["-m", "tasks", "extract", "small"], tmp_path, ELASTIC_EVENTS=str(tmp_path / "events"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert re.fullmatch(r"error: .*/params\.yaml: does not exist; run from the top .*\n", done.stderr)
    assert re.search(r"^extract small: ended with status 1 after \d+ s$", done.stdout, re.MULTILINE)
    assert events[-1] == {"event": "end", "stage": "extract small", "status": 1}


def test_a_stage_that_does_not_exist_is_refused_with_the_list(tmp_path):
    done, _ = run(["-m", "tasks", "trian_short"], tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: stage: got 'trian_short'; allowed: evaluate, extract, fingerprint, parent," in done.stderr
    done, _ = run(["-m", "tasks"], tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("usage: python -m tasks STAGE [BUDGET]; stages: evaluate,")
