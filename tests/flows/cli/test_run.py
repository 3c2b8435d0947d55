"""`elastic run` on a pipeline of two stages: what it says, what it shows on a terminal, how it ends."""

import contextlib
import fcntl
import functools
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import types
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

import flows.cli.pipeline
from flows import records
from flows.cli.app import app
from flows.stages import StageInterrupted
from tasks.runs import workspace
from tests.support.pipeline.checkout import write_checkout
from tests.support.places import files_below

pytest.importorskip("dvc")

ROOT = Path(__file__).resolve().parents[3]
PIPELINE = """\
stages:
  data:
    cmd: python stage.py data
    params: [data]
    outs: [data.txt]
  report:
    cmd: python stage.py report
    deps: [data.txt]
    params: [report]
    outs: [reports/report.md, reports/metrics.json, reports/results.json]
"""
STAGE = """\
import json, os, pathlib, sys, time, yaml
name = sys.argv[1]
def note(**event):
    with open(os.environ["ELASTIC_EVENTS"], "a") as file:
        file.write(json.dumps(event) + chr(10))
note(event="begin", stage=name)
params = yaml.safe_load(open("params.yaml"))[name]
on_terminal = sys.stderr.isatty() and os.get_terminal_size(2).columns
print(f"{name} sees a terminal of {on_terminal} columns" if on_terminal else f"{name} sees no terminal", flush=True)
print("\\r 50 %", "\\r100 %", sep="", file=sys.stderr, flush=True)
while params["wait"] and not pathlib.Path("go").exists():
    time.sleep(0.1)
if params["fail"]:
    note(event="end", stage=name, status=params["fail"])
    sys.exit(params["fail"])
pathlib.Path("reports").mkdir(exist_ok=True)
row = {"parameters": 1234, "share": 1.0, "loss": 3.5, "kl_to_parent": 0.0, "latency_ratio": 1.0}
row |= {"weight_mib": 3.0, "cache_mib": 1.0}
if name == "report":
    pathlib.Path("reports/results.json").write_text(json.dumps([{"model": "small", "loss": params.get("loss", 3.6)}]))
    pathlib.Path("reports/metrics.json").write_text(json.dumps({"parent": row, "small": row | {"loss": 3.6}}))
text = name
pathlib.Path({"data": "data.txt", "report": "reports/report.md"}[name]).write_text(text)
"""
CHECK = """\
import sys
problems = [f"error: params.yaml: {text}: no such section" for text in sys.argv[2:] if "unknown" in text]
if problems:
    sys.exit("\\n".join(problems))
print("params.yaml is valid")
"""
RUN = """\
import sys
from pathlib import Path
from flows import stages
from flows.cli import app, pipeline
stages.BUSY_SECONDS = 0.2
original, root = pipeline.run_pipeline, Path(sys.argv.pop(1))
pipeline.run_pipeline = lambda *arguments, **options: original(*arguments, root=root, **options)
app.main()
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout with a pipeline of two stages."""
    files = {
        "dvc.yaml": PIPELINE,
        "stage.py": STAGE,
        "tasks/__init__.py": "",
        "tasks/commands/__init__.py": "",
        "tasks/commands/check.py": CHECK,
        ".dvc/config": "[core]\n    analytics = false\n",
        ".gitignore": "/.runs/\n",
    }
    write_checkout(tmp_path, files)
    set_params(tmp_path)
    return tmp_path


def set_params(checkout, wait=0, fail=0):
    (checkout / "params.yaml").write_text(f"data: {{wait: {wait}, fail: {fail}}}\nreport: {{wait: 0, fail: 0}}\n")


@pytest.fixture
def run(checkout, monkeypatch):
    """What a run in `checkout` says where there is no terminal, on stdout and on stderr."""
    pipeline = functools.partial(flows.cli.pipeline.run_pipeline, root=checkout)
    monkeypatch.setattr(flows.cli.pipeline, "run_pipeline", pipeline)

    def run(*arguments, status=0):
        result = CliRunner().invoke(app, ["run", *arguments])
        assert result.exit_code == status, result.output + result.stderr
        assert result.stderr.count("error: ") == result.stderr.count("\n") == (status > 0)
        return result.stdout, result.stderr

    return run


def start(checkout, *arguments, **options):
    """A run in a process of its own."""
    line = [sys.executable, "-c", RUN, str(checkout), "run", *arguments]
    return subprocess.Popen(line, cwd="/", env={**os.environ, "PYTHONPATH": str(ROOT)}, **options)


def read_terminal(end, until, seconds=30):
    """What appears on a terminal, up to some words or its end."""
    text, deadline = "", time.monotonic() + seconds
    while until not in text:
        assert time.monotonic() < deadline, text
        if select.select([end], [], [], 0.5)[0]:
            try:
                text += os.read(end, 4096).decode(errors="replace")
            except OSError:
                break
    return text


def test_run_brings_everything_up_to_date_and_shows_the_table(checkout, run):
    out, _ = run()
    assert "params.yaml is valid" in out and "data sees no terminal" in out
    table = out.splitlines()[-6:]
    assert [line.split()[:2] for line in table[:3]] == [
        ["model", "parameters"],
        ["parent", "1,234"],
        ["small", "1,234"],
    ]
    assert max(map(len, table[:3])) <= 100 and table[4] == f"report: {checkout}/reports/report.html"
    out, _ = run()
    assert "up to date" in out and "sees" not in out and "1,234" in out  # .ci/run looks for these words


def test_runs_leave_a_record_and_two_are_compared(checkout, run, monkeypatch):
    def compare(*arguments, status=0):
        monkeypatch.setattr("tasks.settings.profiles.ROOT", checkout)
        result = CliRunner().invoke(app, ["compare", *arguments])
        assert result.exit_code == status, result.output
        return result.stdout + result.stderr

    assert "takes two finished runs" in compare(status=1)
    out, _ = run()
    first = re.search(r"^run: (default-\d{4}-\d\d-\d\d-\d\d-\d\d) \(in reports/runs;", out, re.MULTILINE)[1]
    directory = checkout / records.NAMED / first
    assert {path.name for path in directory.iterdir()} == {
        *("results.json", "metrics.json", "params.yaml", "dvc.lock", "run.json"),
    }
    record = records.read_record(directory)
    assert (record["profile"], record["parameters"], record["workspace"]) == ("default", {}, str(checkout))
    assert f"run: {first} " in run()[0] and records.records(checkout) == [first]  # nothing has changed
    run("--set", "report.loss=3.5")
    second = next(name for name in records.records(checkout) if name != first)
    assert records.read_record(checkout / records.NAMED / second)["parameters"] == {"overrides": ["report.loss=3.5"]}
    told = compare(first, second).splitlines()
    assert told[0] == f"{first} → {second}: 1 parameter and 1 result differ"
    assert [line.split() for line in told[3:]] == [
        ["parameter", "report.loss", "–", "3.5", "–"],
        ["result", "small:", "loss", "3.6", "3.5", "-0.1"],
    ]
    assert compare(first.replace("-", " ", 1)).splitlines()[0] == told[0]
    assert f"run: got 'nope'; allowed: {', '.join(records.records(checkout))}" in compare("nope", status=1)


def test_run_of_some_stages_with_other_parameters(checkout, run):
    arguments = ("--until", "data", "--set", "data.other=0.1")
    out, _ = run(*arguments)
    assert "data sees" in out and "report sees" not in out and "1,234" not in out
    workspace = next((checkout / ".runs").iterdir())
    assert f"workspace: {workspace}" in out and (workspace / "data.txt").is_file()
    assert not (checkout / "data.txt").exists()
    assert "data sees" in run(*arguments, "--force")[0]


def test_a_stage_that_fails_fails_the_run(checkout, run):
    set_params(checkout, fail=3)
    out, error = run(status=1)
    assert "stage 'data' ended with exit status 3" in error and "data sees" in out and "report sees" not in out


def test_what_another_try_may_mend_is_said(run, monkeypatch):
    def reproduce(*_):
        raise StageInterrupted("stage 'data' ended with exit status 75 in /there", ["the server is away"])

    monkeypatch.setattr(flows.cli.pipeline, "reproduce", reproduce)
    _, error = run(status=os.EX_TEMPFAIL)
    assert "exit status 75 in /there, see above; another try may help" in error


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--from", "dta"], "'dta'; allowed: data, report"),
        (["--from", "report", "--until", "data"], "nothing is left"),
        (["tiny"], "profile: got 'tiny'"),
        (["--budget", "small"], "NAME=BUDGET"),
        (["--budget", "small=much"], "NAME=BUDGET, such as small=0.4, small=9B, small=16GiB@128k or small=35ms/token"),
        (["--set", "nothing"], "section.key=value"),
        (["--budget", "a b=0.4"], "NAME=BUDGET"),
        (["--budget", "=0.4"], "NAME=BUDGET"),
        (["--budget", "small=0.4", "--budget", "small=0.5"], "got small twice"),
        (["--set", "data.wait="], "section.key=value"),
        (["--set", "data.wait=[1"], "the value is not valid YAML"),
        (["--set", "data.wait={a: 1, a: 2}"], "found duplicate key"),
        (["--set", "unknown.key=1"], "error: params.yaml: --set=unknown.key=1: no such section"),
    ],
)
def test_run_refuses_what_cannot_be_and_writes_nothing(checkout, run, arguments, words):
    before = files_below(checkout)
    out, error = run(*arguments, status=1)
    assert words in error and "sees" not in out
    assert files_below(checkout) == before


def test_all_problems_of_the_parameters_are_listed(checkout, run):
    result = CliRunner().invoke(app, ["run", *(f"--set=unknown.key{i}=1" for i in range(30))])
    assert result.exit_code == 1 and not (checkout / ".runs").exists()
    lines = result.stderr.splitlines()
    assert len(lines) == 30 and all(line.startswith("error: params.yaml: ") for line in lines)


def test_run_and_up_outside_of_a_checkout_say_what_to_do(tmp_path, monkeypatch):
    """As after an installation that is not editable."""
    monkeypatch.setattr("tasks.settings.merging.ROOT", tmp_path)
    pipeline = functools.partial(flows.cli.pipeline.run_pipeline, root=tmp_path)
    monkeypatch.setattr(flows.cli.pipeline, "run_pipeline", pipeline)
    for command in ("run", "up"):
        result = CliRunner().invoke(app, [command])
        assert result.exit_code == 1
        assert result.stderr.startswith(f"error: {tmp_path}: is no checkout (it has no dvc.yaml); clone the repository")
        assert result.stderr.count("\n") == 1


def test_on_a_terminal_stages_draw_and_a_busy_one_is_waited_for(checkout):
    """Another run holds the stage `data`: that is said once, and then the stages see a terminal of the same size."""
    set_params(checkout, wait=1)
    first = start(checkout, "--only", "data", stdout=subprocess.PIPE, text=True)
    assert any("data sees" in line for line in first.stdout)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 77, 0, 0))
    second = start(checkout, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = read_terminal(ours, "Waiting")
    time.sleep(2)  # for some more looks
    (checkout / "go").touch()
    text += read_terminal(ours, "report.html")
    assert first.wait(60) == 0 and second.wait(60) == 0
    assert text.count("Waiting until it is free") == 1 and text.count("blocked by") == 1
    assert "report sees a terminal of 77 columns" in text and "\r 50 %\r100 %" in text and "data sees" not in text
    first.stdout.close()
    os.close(ours)


def test_a_run_waits_for_another_in_its_workspace_before_it_rewrites_that(checkout, run, monkeypatch):
    overrides = ["data.other=1"]
    first = contextlib.ExitStack()
    held = first.enter_context(workspace.prepared("default", checkout, None, overrides, pytest.fail))
    before = (held / "params.yaml").read_text()
    (checkout / "params.yaml").write_text(before + "new: 1\n")

    def sleep(_):
        assert (held / "params.yaml").read_text() == before and not (held / "data.txt").exists()
        first.close()

    monkeypatch.setattr(workspace, "time", types.SimpleNamespace(sleep=sleep))
    out, _ = run("--until", "data", "--set", *overrides)
    assert f"held by process {os.getpid()} of " in out and out.count("Waiting until it is free") == 1
    assert "new: 1" in (held / "params.yaml").read_text() and (held / "data.txt").exists()
    assert workspace.holder_of(held) is None


def test_ctrl_c_ends_everything(checkout):
    set_params(checkout, wait=1)
    number, ours = pty.fork()
    if number == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which is ignored below a job in the background of a script
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        os.execve(sys.executable, [sys.executable, "-c", RUN, str(checkout), "run"], environment)
    read_terminal(ours, "data sees")
    stage = [process for process in psutil.Process(number).children(recursive=True) if "stage.py" in process.cmdline()]
    assert stage
    os.write(ours, b"\x03")
    assert "goes on from the newest checkpoint" in read_terminal(ours, "newest checkpoint")
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 130
    assert not psutil.wait_procs(stage, timeout=30)[1]  # whoever adopts them may take a moment to bury them
    os.close(ours)
