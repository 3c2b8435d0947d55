"""The flow, the guard and the dashboard, on the tiny pipeline of tests/support/flows_fixture/pipeline."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import httpx
import pytest

pytest.importorskip("prefect")
pytest.importorskip("dvc")

from prefect.exceptions import ParameterTypeError

from flows import elastic, publish, records, stages
from flows.dashboard import pages, server
from flows.process import output
from flows.process.guard import guarded
from tasks.runtime.environment import DEFAULTS
from tests.support.flows_fixture.driver import MARK, Dashboard, marked, set_params, wait_for

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.server


def make_checkout(path: Path) -> Path:
    """A checkout with the real flows and the pipeline of tests/support/flows_fixture/pipeline."""
    shutil.copytree(ROOT / "tests/support/flows_fixture/pipeline", path, dirs_exist_ok=True)
    for name in ("flows", ".dvc"):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("cache", "tmp", "__pycache__"))
    for name in ("prefect.toml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, path / name)
    for name in (
        "progress/metrics_file",
        "progress/events",
        "progress/durations",
        "runs/dvc",
        "runs/from_the_start",
        "runs/key",
        "runs/lock",
        "runs/provenance",
        "runs/workspace",
        "settings/profiles",
        "settings/budgets",
        "settings/merging",
        "settings/paths",
        "settings/yaml_files",
    ):
        target = path / "tasks" / f"{name}.py"
        target.parent.mkdir(exist_ok=True)
        (target.parent / "__init__.py").touch()
        shutil.copy(ROOT / "tasks" / f"{name}.py", target)
    subprocess.run(["git", "init", "-q", path], check=True)
    return path


@pytest.fixture
def mark():
    """A mark for what this test starts; nothing that carries it may be left at the end."""
    value = uuid.uuid4().hex
    yield value
    wait_for(lambda: not marked(value), 30, "all processes of the test to end")


@pytest.fixture
def checkout(tmp_path):
    return make_checkout(tmp_path)


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory):
    """A running dashboard; whoever stops it starts it again. At the end it has to leave nothing."""
    dashboard = Dashboard(make_checkout(tmp_path_factory.mktemp("dashboard")))
    try:
        dashboard.start()
        yield dashboard
        dashboard.process.terminate()
        assert dashboard.process.wait(60) == 0
        wait_for(lambda: not marked(dashboard.mark), 60, "nothing to be left")
    finally:
        dashboard.kill()


# --- the guard -------------------------------------------------------------------------------------------------------

# Three generations, one in a session of its own, one deaf to TERM.
TREE = ["sh", "-c", "setsid sh -c 'trap \"\" TERM; while :; do sleep 1; done' & setsid sleep 600 & sleep 600"]


def start_tree(mark: str) -> subprocess.Popen:
    """A parent that holds a guarded tree."""
    code = f"""
import signal, time
from flows.process.guard import guarded
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
with guarded({TREE!r}, grace=0.5): time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, MARK: mark})
    wait_for(lambda: sum("sleep 600" in line for line in marked(mark)) >= 4, 60, "the tree to start")
    return parent


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_dead_parent_leaves_nothing(mark, number):
    parent = start_tree(mark)
    parent.send_signal(number)
    parent.wait(30)
    wait_for(lambda: not marked(mark), 30, "the tree to end")


def test_a_guard_told_to_stop_ends_its_tree(mark):
    with guarded(TREE, grace=0.5, env={**os.environ, MARK: mark}) as process:
        wait_for(lambda: sum("sleep 600" in line for line in marked(mark)) >= 3, 60, "the tree to start")
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
        assert not marked(mark)


def test_guard_passes_the_status_on_and_ends_what_the_command_left(mark):
    command = ["sh", "-c", "setsid sleep 600 & exit 3"]
    with guarded(command, grace=5, env={**os.environ, MARK: mark}) as process:
        assert process.wait(30) == 3
        assert not marked(mark)


# --- a stage's output ------------------------------------------------------------------------------------------------


def test_lines_survive_any_cut_into_chunks():
    raw = "eins\r\nzwei ü\n\n\x1b[31mrot\x1b[0m\nlast".encode()
    expected = ["eins", "zwei ü", "rot", "last"]
    for size in (1, 2, 3, len(raw)):
        chunks = [raw[i : i + size] for i in range(0, len(raw), size)]
        assert list(output.read_lines(chunks)) == expected


def test_progress_is_thinned_out_and_its_end_is_shown():
    bar = [f"\r{percent} %".encode() for percent in range(101)]
    assert list(output.read_lines([*bar, b"\ndone\n"], every=3600)) == ["0 %", "100 %", "done"]
    assert list(output.read_lines([b"1 %\r", b"2 %\r", b"3 %\r"], every=3600)) == ["1 %", "3 %"]
    assert len(list(output.read_lines([*bar, b"\n"], every=0))) == 101


def test_commands_are_fast_unless_the_caller_has_chosen_otherwise(monkeypatch):
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = output.environment()
    assert found["MALLOC_TRIM_THRESHOLD_"] == DEFAULTS["MALLOC_TRIM_THRESHOLD_"] and found["OMP_NUM_THREADS"] == "7"
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ


def test_lines_come_while_the_command_runs(tmp_path):
    times = []
    code = "import time; print('a'); time.sleep(1); print('b'); raise SystemExit(4)"
    status, tail = output.follow([sys.executable, "-c", code], tmp_path, lambda line: times.append(time.monotonic()))
    assert (status, tail) == (4, ["a", "b"])
    assert times[1] - times[0] > 0.5


def test_a_killed_guard_does_not_hang_the_run(mark, tmp_path, monkeypatch):
    monkeypatch.setenv(MARK, mark)
    code = "import os, signal, time; print('x'); os.kill(os.getppid(), signal.SIGKILL); time.sleep(600)"
    status, tail = output.follow([sys.executable, "-c", code], tmp_path, print)
    assert (status, tail) == (-signal.SIGKILL, ["x"])


# --- the flow in this process ----------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(dashboard, checkout, monkeypatch):
    """The flow runs here, on a temporary checkout, and reports to the temporary server."""
    set_params(checkout, seconds=0)
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_HOME,
        PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW,
        temporary_settings,
    )

    monkeypatch.setattr(elastic, "ROOT", checkout)
    settings = {
        PREFECT_API_URL: dashboard.url,
        PREFECT_HOME: checkout / ".prefect",
        PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW: "ignore",  # some tests call a task without its flow
    }
    with temporary_settings(settings):
        yield checkout


def test_an_unchanged_stage_says_so(pipeline, caplog):
    elastic.run_stage("prepare_data", pipeline)
    assert "Completed('Ran prepare_data')" in caplog.text
    caplog.clear()
    elastic.run_stage("prepare_data", pipeline)
    assert "Cached(" in caplog.text and runs_of(caplog, "prepare_data") == 0
    caplog.clear()
    elastic.run_stage("prepare_data", pipeline, force=True)
    assert "Completed('Ran prepare_data')" in caplog.text


def runs_of(caplog, stage: str) -> int:
    return [record.message for record in caplog.records].count(f"{stage} begins")


def test_a_stage_that_may_succeed_later_is_tried_again(pipeline, caplog):
    set_params(pipeline, seconds=0, fail=os.EX_TEMPFAIL)
    elastic.run_stage("prepare_data", pipeline)
    with pytest.raises(stages.StageInterrupted, match="exit status 75"):
        elastic.run_stage.with_options(retries=1, retry_delay_seconds=0)("train", pipeline)
    assert runs_of(caplog, "train") == 2


def test_a_busy_stage_is_waited_for(pipeline, caplog, monkeypatch):
    lock = pipeline / ".dvc/tmp/rwlock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    blocker = {"pid": os.getpid(), "cmd": "dvc repro"}
    lock.write_text(json.dumps({"write": {str(pipeline / "artifacts/prepare_data"): blocker}, "read": {}}))
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            lock.unlink()

    monkeypatch.setattr(stages.time, "sleep", sleep)
    elastic.run_stage("prepare_data", pipeline)
    assert looks == [stages.BUSY_SECONDS] * 2
    assert f"(PID {os.getpid()}): dvc repro" in caplog.text and caplog.text.count("Waiting until it is free") == 1
    assert (pipeline / "artifacts/prepare_data").exists()


def test_a_stage_that_takes_too_long_is_stopped(pipeline, mark, monkeypatch, caplog):
    monkeypatch.setenv(MARK, mark)
    set_params(pipeline, seconds=600, time_limits={"train": 20 / 3600})
    with pytest.raises(TimeoutError, match=r"stage train: stopped after 0\.00555556 hours \(time_limits in params"):
        elastic.elastic()
    assert not marked(mark) and runs_of(caplog, "train") == 1


def test_wrong_parameters_stop_the_flow_before_any_stage(pipeline, caplog):
    with pytest.raises(ParameterTypeError, match="profile"):
        elastic.elastic(profile="nonsense")
    with pytest.raises(ParameterTypeError, match="overrides"):
        elastic.elastic(overrides=["steps 5"])
    with pytest.raises(ParameterTypeError, match="budgets"):
        elastic.elastic(budgets=["twice=2"])
    with pytest.raises(ParameterTypeError, match="allowed: NAME=BUDGET, such as small="):
        elastic.elastic(budgets=["small"])
    with pytest.raises(ValueError, match="budgets: got half twice; allowed: every name once"):
        elastic.elastic(budgets=["half=0.5", "half=9B"])
    with pytest.raises(ValueError, match=r"nothing is left from report until prepare_data"):
        elastic.elastic(from_stage="report", until_stage="prepare_data")
    with pytest.raises(ValueError, match=r"(?s)parameters are not valid.*train.seconds: got 'soon'"):
        elastic.elastic(overrides=["train.seconds=soon"])
    assert " begins" not in caplog.text


def test_a_run_is_named_and_its_state_has_the_result_or_the_reason(pipeline, dashboard, caplog):
    """Of one checkout: some stages, all of them, the same with another parameter, a stage that fails, no stage."""

    def last_run() -> dict:
        return dashboard.post("flow_runs/filter", sort="EXPECTED_START_TIME_DESC", limit=1)[0]

    elastic.elastic(until_stage="prepare_data")
    assert runs_of(caplog, "prepare_data") == 1 and runs_of(caplog, "train") == 0
    assert last_run()["state"]["message"] == "up to date: fingerprint, prepare_data"

    elastic.elastic()
    run = last_run()
    assert re.fullmatch(r"default \d{4}-\d\d-\d\d \d\d:\d\d", run["name"])
    assert run["state"]["message"] == "small 0.43: held-out loss 3.52, KL 0.20; parent 1.00: held-out loss 3.40"
    kept = pipeline / records.NAMED / re.sub("[ :]", "-", run["name"])
    assert json.loads((kept / records.RECORD).read_text())["name"] == run["name"]

    set_params(pipeline, seconds=0, size=5)
    elastic.elastic()
    latest = dashboard.post("artifacts/latest/filter", artifacts={"key": {"any_": ["changes"]}})
    assert latest[0]["flow_run_id"] == last_run()["id"]
    assert {row["name"]: row["after"] for row in json.loads(latest[0]["data"])}["train.size"] == 5

    caplog.clear()
    with pytest.raises(stages.StageFailed, match=r"(?s)'train' ended with exit status 1 in.*train was told to fail"):
        elastic.elastic(overrides=["train.fail=1"])
    assert runs_of(caplog, "train") == 1  # it is not tried again
    assert last_run()["state"]["message"] == "stage train: train was told to fail"
    assert last_run()["state"]["type"] == "FAILED"

    with pytest.raises(ValueError):
        elastic.elastic(from_stage="report", until_stage="prepare_data")
    assert "nothing is left from report until prepare_data" in last_run()["state"]["message"]


def test_a_users_name_is_kept():
    assert all(map(publish.MADE_UP.fullmatch, ("onyx-spaniel", "2026-11-29 21:43")))
    assert not any(map(publish.MADE_UP.fullmatch, ("larger lr", "Larger-lr", "lr-2e-3", "baseline")))


def test_only_a_run_that_goes_on_says_so(pipeline, caplog):
    elastic.run_stage("prepare_data", pipeline)
    for resumed_at, expected in ((None, []), (4, ["train: going on from its checkpoint of step 4 of 10"])):
        set_params(pipeline, seconds=0, resumed_at=resumed_at)
        elastic.run_stage("train", pipeline)
        assert [record.message for record in caplog.records if "going on from" in record.message] == expected
    assert runs_of(caplog, "train") == 2


def test_a_selection_of_stages():
    names = ["data", "rank", "train", "report"]
    assert stages.select(names, None, None) == names
    assert stages.select(names, "rank", "train") == ["rank", "train"]
    assert stages.select(names, "rank", None, ["report", "data"]) == ["report"]
    with pytest.raises(ValueError, match="stage: got 'tarin'; allowed: data, rank, train, report"):
        stages.select(names, None, None, ["tarin"])


def test_results_need_the_same_keys_in_every_row(tmp_path):
    (tmp_path / "reports").mkdir()
    with pytest.raises(FileNotFoundError, match=r"results\.json is not there"):
        publish.read_results(tmp_path)
    (tmp_path / records.REPORT).write_text("")
    (tmp_path / records.RESULTS).write_text('[{"a": 1}, {"b": 2}]')
    with pytest.raises(ValueError, match="the same keys"):
        publish.read_results(tmp_path)


# --- the dashboard, from outside -------------------------------------------------------------------------------------


def test_dashboard_refuses_a_taken_port(checkout):
    dashboard = Dashboard(checkout)
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(dashboard.environment["PREFECT_SERVER_API_PORT"])))
        other.listen()
        output = dashboard.refused()
    assert "cannot listen on 127.0.0.1" in output and "choose another port" in output


def test_dashboard_refuses_a_wrong_url():
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_API_HOST, PREFECT_SERVER_API_PORT, temporary_settings

    settings = {PREFECT_SERVER_API_HOST: "127.0.0.1", PREFECT_SERVER_API_PORT: 4300}
    with temporary_settings(settings | {PREFECT_API_URL: "http://127.0.0.1:4300/api"}):
        assert server.read_address().url == "http://127.0.0.1:4300"
    with (
        temporary_settings(settings | {PREFECT_API_URL: "https://example.org/api"}),
        pytest.raises(SystemExit, match=r"api\.url is 'https://example\.org/api' but the server"),
    ):
        server.read_address()


def test_pages_are_corrected_once(tmp_path):
    pages.only_first_version(tmp_path)
    pages.only_first_version(tmp_path)
    assert not (tmp_path / "v2").exists()
    (tmp_path / "v1").mkdir()
    page = tmp_path / "v1/index.html"
    page.write_text("<html><head><title>Prefect</title></head></html>")
    for port in (1, 2):
        pages.correct(tmp_path, f"http://127.0.0.1:{port}")
        assert page.read_text().count("<script>") == 1
    assert "ws://127.0.0.1:2" in page.read_text() and "127.0.0.1:1" not in page.read_text()
    assert page.read_text().endswith("<title>Prefect</title></head></html>")


def test_the_form_knows_a_profile_that_was_added(dashboard):
    def profiles() -> list[str]:
        deployment = dashboard.post("deployments/filter", deployments={"name": {"any_": ["full"]}})[0]
        return deployment["parameter_openapi_schema"]["properties"]["profile"]["enum"]

    assert profiles() == ["default", "failing"]
    added = dashboard.checkout / "profiles/added.yaml"
    added.write_text("train: {seconds: 1}\n")
    wait_for(lambda: profiles() == ["default", "added", "failing"], 30, "the form to know the profile")
    deployment = dashboard.post("deployments/filter", deployments={"name": {"any_": ["full"]}})[0]["id"]
    address = f"{dashboard.url}/deployments/{deployment}/create_flow_run"
    refused = httpx.post(address, json={"parameters": {"profile": "other"}}, timeout=20)
    assert refused.status_code == 409 and "'other' is not one of ['default', 'added', 'failing']" in refused.text
    added.unlink()
    wait_for(lambda: profiles() == ["default", "failing"], 30, "the form to forget the profile")


@pytest.mark.slow
def test_a_run_by_command_line_shows_log_and_artifacts(dashboard):
    assert "already runs" in dashboard.refused()
    set_params(dashboard.checkout, seconds=0)
    watched = dashboard.watch_run()
    assert watched.returncode == 0, watched.stdout + watched.stderr
    assert "train begins" in watched.stdout
    run = dashboard.post("flow_runs/filter", sort="START_TIME_DESC")[0]
    assert run["state_name"] == "Completed"
    tasks = dashboard.post("task_runs/filter", flow_runs={"id": {"any_": [run["id"]]}}, sort="EXPECTED_START_TIME_ASC")
    assert [task["name"] for task in tasks] == ["check_parameters", *stages.stage_names(dashboard.checkout)]
    wait_for(lambda: "train begins" in dashboard.logs(run["id"]), 60, "the log to arrive")
    found = dashboard.post("artifacts/filter", artifacts={"flow_run_id": {"any_": [run["id"]]}})
    artifacts = {artifact["key"]: artifact["data"] for artifact in found}
    assert json.loads(artifacts["results"]) == json.loads((dashboard.checkout / records.RESULTS).read_text())
    assert "All is well" in artifacts["report"]
    assert artifacts["train-progress"] == 100.0
    losses = {row["budget"]: row for row in json.loads(artifacts["train-losses"])}
    assert losses.keys() == {"full", "small"} and losses["full"]["last step"] == 10
    assert losses["small"]["budget error"] == "1.00%"
    page = httpx.get(artifacts["report-page"].split("(")[1].rstrip(")"))
    assert page.status_code == 200 and "All is well" in page.text
    assert f"run | {run['name']}" in artifacts["run"]


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cancelled_or_killed_leaves_nothing_and_the_next_start_tidies_up(dashboard):
    def stage_runs() -> bool:
        return "sleep 600" in marked(dashboard.mark)

    set_params(dashboard.checkout, seconds=600)
    cancelled = dashboard.start_run()
    wait_for(stage_runs, 120, "the long stage to start")
    queued = dashboard.start_run()
    wait_for(lambda: dashboard.state(queued) == "AwaitingConcurrencySlot", 60, "the second run to queue")
    dashboard.post(f"flow_runs/{queued}/set_state", state={"type": "CANCELLED"})
    dashboard.post(f"flow_runs/{cancelled}/set_state", state={"type": "CANCELLING"})
    wait_for(lambda: not stage_runs(), 60, "the cancelled stage to end")
    wait_for(lambda: dashboard.state(cancelled) == "Cancelled", 60, "the run to be cancelled")

    lost = dashboard.start_run()
    wait_for(stage_runs, 120, "the long stage to start again")
    dashboard.process.kill()
    dashboard.process.wait()
    dashboard.start()  # waits for what the killed one left
    assert not stage_runs()
    assert dashboard.state(lost) == "Crashed"
    dashboard.start_run()  # its slot is free again
    wait_for(stage_runs, 120, "a stage after the restart")  # and the fixture stops the dashboard in the middle of it
