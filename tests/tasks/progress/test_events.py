"""Events: a line of JSON each, in the file that a variable names; nothing without the variable."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.progress import events

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("ELASTIC_EVENTS", str(tmp_path / "events"))
    return tmp_path / "events"


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_event_is_a_line_of_json(file):
    assert events.are_wanted() and not file.exists()
    events.note(event="begin", stage="rank")
    assert read(file) == [{"event": "begin", "stage": "rank"}]
    events.note(event="end", stage="extract@small\n", status=75)
    assert read(file) == [
        {"event": "begin", "stage": "rank"},
        {"event": "end", "stage": "extract@small\n", "status": 75},
    ]


def test_nothing_is_written_without_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("ELASTIC_EVENTS", raising=False)
    monkeypatch.chdir(tmp_path)
    events.note(event="begin", stage="rank")
    assert not events.are_wanted() and list(tmp_path.iterdir()) == []


def test_lines_of_several_processes_do_not_mix(file):
    code = (
        "import sys; from tasks.progress import events\nfor i in range(300): events.note(event=sys.argv[1] * 50, i=i)"
    )
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    writers = [subprocess.Popen([sys.executable, "-c", code, name], env=variables) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    found = read(file)
    for name in "ab":
        assert [event["i"] for event in found if event["event"] == name * 50] == list(range(300))
    assert len(found) == 600


def test_reading_and_writing_events_needs_the_standard_library_only():
    code = "import sys; from tasks.progress import events; print([n for n in sys.modules if n in ('torch', 'tqdm')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
