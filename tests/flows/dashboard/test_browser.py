"""The dashboard as a person meets it: one command, a browser, the smoke profile; and no call to any other host.

The tests share one dashboard and go through its day in the order of this file: a form, a run, its results, the same
run again, a comparison, a run that is cancelled and goes on. Pictures of the pages land in reports/screenshots/.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

pytest.importorskip("prefect")
pytest.importorskip("dvc")
pytest.importorskip("playwright")

from playwright.sync_api import expect

from flows.records import NAMED, safe_name
from flows.stages import stage_names
from tests.support.flows_fixture import ui as pages
from tests.support.flows_fixture.driver import Dashboard, copy_checkout, marked, wait_for

ROOT = Path(__file__).resolve().parents[3]
LOOPBACK_ONLY = ROOT / "tests/support/flows_fixture/loopback_only"
STAGES = stage_names(ROOT)
LATE = "evaluate"  # where a run begins that only needs to be short
LONG = "train_short.steps=3000"  # of the stage that is cancelled; it goes on and is not waited for
LOSS = "loss, nats/token"  # as its column is called in the table of results
CANCEL_SECONDS = 60
MINUTES = 60.0  # waits are long: the smoke profile takes two where both cores are free, ten where they are shared
pytestmark = [pytest.mark.browser, pytest.mark.server]
slow = [pytest.mark.slow, pytest.mark.timeout(20 * 60)]
needs_browser = pytest.mark.skipif(not pages.CHROMIUM.exists(), reason=f"no {pages.CHROMIUM} (.ci/run installs it)")


def in_browser(test):
    """What all tests of the pages are: slow, and skipped where there is no browser."""
    for mark in (*slow, needs_browser):
        test = mark(test)
    return test


# --- one dashboard for all ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outside_calls(tmp_path_factory):
    """The file that notes what Python processes of the dashboard ask of other hosts."""
    return tmp_path_factory.mktemp("outside") / "calls"


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory, outside_calls):
    """The one command in a copy of this checkout; with it, its server, worker, runs and their stages."""
    checkout = copy_checkout(ROOT, tmp_path_factory.mktemp("browser") / "checkout")
    with open(checkout / "profiles/smoke.yaml", "a") as profile:
        profile.write("budgets: {small: 0.43}\n")  # each budget costs as much as two stages
    dashboard = Dashboard(checkout)
    dashboard.environment |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(LOOPBACK_ONLY),
        "OUTSIDE_CALLS": str(outside_calls),
    }
    with pages.network_without_outside():
        try:
            dashboard.start()
            yield dashboard
            dashboard.process.terminate()
            assert dashboard.process.wait(60) == 0
            wait_for(lambda: not marked(dashboard.mark), 60, "all processes to end")
        finally:
            dashboard.kill()


@pytest.fixture(scope="module")
def ui(dashboard):
    with pages.browser(dashboard.url.removesuffix("/api"), ROOT / "reports/screenshots") as ui:
        yield ui


@pytest.fixture(scope="module")
def smoke(ui):
    """A run of the smoke profile, just started through the form."""
    ui.open_form("full")
    ui.choose("profile", "smoke")
    ui.shot("form")
    return ui.submit()


@pytest.fixture(scope="module")
def finished(dashboard, ui, smoke):
    """The same run when it has ended."""
    wait_for_end(dashboard, ui, smoke, 15 * MINUTES)
    assert dashboard.state(smoke) == "Completed", dashboard.logs(smoke)
    return smoke


def wait_for_end(dashboard: Dashboard, ui, run: str, seconds: float) -> None:
    ui.rest()
    ends = ("Completed", "Failed", "Crashed", "Cancelled")
    wait_for(lambda: dashboard.state(run) in ends, seconds, "the run to end", every=1)


def wait_for_log(dashboard: Dashboard, ui, run: str, text: str, seconds: float) -> None:
    """Wait without a page until a run has said something."""
    ui.rest()
    wait_for(lambda: text in dashboard.logs(run), seconds, text, every=1)


def seconds_of_stages(dashboard: Dashboard, run: str) -> float:
    tasks = dashboard.post("task_runs/filter", flow_runs={"id": {"any_": [run]}})
    return sum(task["total_run_time"] for task in tasks if task["name"] in STAGES)


# --- the day of a run -----------------------------------------------------------------------------------------------


@in_browser
def test_the_form_refuses_what_is_wrong(dashboard, ui):
    ui.open_form("full")
    for name in ("profile", "from_stage", "until_stage", "only_stages", "budgets", "overrides", "force"):
        expect(ui.parameter(name)).to_be_visible()
    ui.parameter("until_stage").locator(".p-select-button__control").click()
    expect(ui.page.get_by_role("option")).to_have_text(STAGES)
    ui.page.keyboard.press("Escape")
    for parameter, value, problem in (
        ("budgets", "twice=2", "'NAME=BUDGET, such as small=0.4, small=9B, small=16GiB@128k or small=35ms/token' was"),
        ("overrides", "steps 5", "'section.key=value, such as train_short.learning_rate=1e-3' was expected"),
    ):
        ui.add(parameter, value)
        ui.page.get_by_role("button", name="Submit").click()
        ui.see(problem)
    ui.shot("form-refused")
    assert dashboard.post("flow_runs/filter") == []


@in_browser
def test_a_run_shows_what_it_does(dashboard, ui, smoke):
    assert [run["id"] for run in dashboard.post("flow_runs/filter")] == [smoke]
    wait_for_log(dashboard, ui, smoke, "prepare_data …", 3 * MINUTES)
    ui.open_run(smoke)
    ui.see("prepare_data …")
    ui.see("parent …", 3 * MINUTES)  # the page follows the log by itself
    wait_for_log(dashboard, ui, smoke, "parent: step ", 3 * MINUTES)
    ui.open_run(smoke)
    ui.see("parent: step ")
    wait_for(lambda: green_pixels(ui) > 0, 60, "a finished stage in the timeline")
    ui.shot("run")
    ui.tab("Task Runs")
    ui.page.get_by_role("link", name="parent", exact=True).click()
    ui.see("parent: step ")  # the stage's own log
    assert "prepare_data …" not in ui.page.inner_text("body")
    ui.shot("stage")


def green_pixels(ui) -> int:
    """How many pixels of the timeline have the colour of what is completed."""
    return sum(
        pixels
        for (red, green, blue), pixels in ui.colours_of_timeline().items()
        if green > 100 and green > 1.5 * max(red, blue)
    )


@in_browser
def test_a_finished_run_shows_its_results(dashboard, ui, finished):
    ui.open_run(finished, "Artifacts")
    ui.see("report-page")
    ui.shot("artifacts")
    wait_for(lambda: green_pixels(ui) > 1000, 60, "the finished stages in the timeline")  # it is drawn bit by bit

    ui.open_artifact("results")
    head, *rows = ui.rows()
    assert head[:2] == ["budget", "model"] and LOSS in head
    written = json.loads((dashboard.checkout / ".runs/smoke/reports/results.json").read_text())
    assert [row[:2] for row in rows] == [[row["budget"], row["model"]] for row in written]
    assert all(float(row[head.index(LOSS)]) > 0 for row in rows if row[head.index("parameters")])
    ui.shot("results")

    ui.open_run(finished, "Artifacts")
    ui.open_artifact("report")
    wait_for(lambda: len(images := ui.colours_of_images()) >= 4 and min(images) > 20, 30, "the report's pictures")
    ui.page.set_viewport_size({"width": 1280, "height": 2600})
    ui.shot("report")
    ui.page.set_viewport_size({"width": 1280, "height": 1000})


@in_browser
def test_a_finished_run_says_where_it_came_from(dashboard, ui, finished):
    ui.open_run(finished, "Artifacts")
    ui.open_artifact("run")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=dashboard.checkout, capture_output=True, text=True)
    ui.see(head.stdout[:12])
    ui.see("smoke")
    ui.shot("provenance")
    links = {link.inner_text(): link.get_attribute("href") for link in ui.page.locator("article a").all()}
    assert "small: 0.43" in httpx.get(links["params.yaml"]).text
    assert (
        "config.json" in httpx.get(links["extended"]).text and "model.safetensors" in httpx.get(links["extended"]).text
    )
    with ui.context.expect_page() as opened:
        ui.page.evaluate("url => window.open(url)", links["report.html"])
    report = opened.value
    expect(report.locator("h1")).to_be_visible()
    expect(report.locator("svg, canvas, img").nth(3)).to_be_attached()  # at least four plots
    ui.shot("report-page", report)
    report.close()


@in_browser
def test_the_list_of_runs_says_which_is_which(dashboard, ui, finished):
    run = dashboard.post("flow_runs/filter", flow_runs={"id": {"any_": [finished]}})[0]
    assert re.fullmatch(r"smoke \d{4}-\d\d-\d\d \d\d:\d\d", run["name"])
    message = r"small 0\.43: held-out loss \d\.\d\d, KL \d\.\d\d; parent 1\.00: held-out loss \d\.\d\d"
    assert re.fullmatch(message, run["state"]["message"])
    for page in ("runs", f"runs/flow-run/{finished}"):
        ui.page.goto(f"{ui.address}/{page}")
        ui.see(run["name"])
        expect(ui.page.locator(".state-message", has_text=run["state"]["message"])).to_be_visible()
        ui.shot(page.replace(f"/flow-run/{finished}", "-one"))


@pytest.mark.thorough
@in_browser
def test_the_same_run_again_is_cached(dashboard, ui, finished):
    ui.open_form("full")
    ui.choose("profile", "smoke")
    ui.choose("from_stage", LATE)
    again = ui.submit()
    wait_for_end(dashboard, ui, again, 5 * MINUTES)
    ui.open_run(again, "Task Runs")
    cached = len(STAGES) - STAGES.index(LATE) + 1  # and the stage that looks for changed inputs, which runs always
    expect(ui.page.get_by_text("Cached", exact=True)).to_have_count(cached)
    ui.shot("cached")
    assert seconds_of_stages(dashboard, again) < seconds_of_stages(dashboard, finished) / 3
    ui.tab("Artifacts")
    ui.open_artifact("changes")
    ui.see("nothing differs")


@in_browser
def test_two_runs_are_compared(dashboard, ui, finished):
    name = dashboard.post("flow_runs/filter", flow_runs={"id": {"any_": [finished]}})[0]["name"]
    first, other = (dashboard.checkout / NAMED / directory for directory in (safe_name(name), "another"))
    shutil.copytree(first, other, symlinks=True)
    parameters = (other / "params.yaml").read_text()
    (other / "params.yaml").write_text(parameters.replace("dead_zone: 0.01", "dead_zone: 0.02"))
    results = json.loads((other / "results.json").read_text())
    results[-2][LOSS] -= 0.5
    (other / "results.json").write_text(json.dumps(results))

    ui.open_form("runs")
    ui.parameter("before").locator("textarea").fill(name)
    ui.parameter("after").locator("textarea").fill("another")
    comparing = ui.submit()
    wait_for_end(dashboard, ui, comparing, 3 * MINUTES)
    ui.open_run(comparing, "Artifacts")
    ui.open_artifact("comparison")
    head, *rows = ui.rows()
    assert head == ["what", "name", "before", "after", "change"]
    assert ["parameter", "routing.dead_zone", "0.01", "0.02", "+0.01"] in rows
    assert ["result", f"small after stage 2: {LOSS}", "-0.5"] in [[row[0], row[1], row[4]] for row in rows]
    ui.shot("comparison")


@pytest.mark.thorough
@in_browser
def test_a_cancelled_run_goes_on_where_it_stopped(dashboard, ui, finished):
    def stage_runs() -> bool:
        return "tasks train_short" in " ".join(marked(dashboard.mark))

    def checkpoints() -> list[Path]:
        found = (dashboard.checkout / ".runs").glob("smoke-*/checkpoints/train_short-*/step-*")
        return [path for path in found if path.name.removeprefix("step-").isdigit()]

    run = start_long(ui)
    ui.rest()
    wait_for(checkpoints, 5 * MINUTES, "a checkpoint", every=0.5)
    ui.open_run(run, "Artifacts")
    ui.open_artifact("train-short-progress")
    ui.see("Progress: ")
    seen = []

    def follows() -> bool:
        found = re.search(r"([\d,]+) of [\d,]+ tokens", ui.text())
        if found and (tokens := int(found[1].replace(",", ""))) not in seen:
            seen.append(tokens)
        return len(seen) >= 2

    wait_for(follows, pages.SECONDS, "the page to follow the artifact")
    assert seen == sorted(seen)
    ui.shot("progress")
    ui.open_run(run, "Artifacts")
    ui.open_artifact("train-short-losses")
    head, *rows = ui.rows()
    assert head == ["budget", "loss", "KL to teacher", "budget error", "last step"] and len(rows) == 1
    ui.shot("losses")

    ui.open_run(run)
    ui.page.get_by_role("button", name="Cancel", exact=True).click()
    confirm = ui.page.get_by_role("button", name="Confirm")
    confirm.wait_for()
    assert stage_runs()
    clicked = time.monotonic()
    confirm.click()
    wait_for(lambda: not stage_runs(), CANCEL_SECONDS, "the cancelled stage to end", every=0.3)
    print(f"cancelled within {time.monotonic() - clicked:.1f} s")
    assert checkpoints()
    wait_for(lambda: dashboard.state(run) == "Cancelled", 30, "the run to be cancelled", every=1)
    ui.see("Cancelled")
    ui.shot("cancelled")

    resumed = start_long(ui, from_stage="train_short")
    wait_for_log(dashboard, ui, resumed, "train_short: step ", 3 * MINUTES)
    assert int(re.search(r"train_short: step (\d+)/", dashboard.logs(resumed))[1]) > 10
    ui.open_run(resumed)
    ui.see(re.compile(r"train_short: going on from its checkpoint of step [\d,]+ of 3,000"))
    ui.shot("resumed")


def start_long(ui, from_stage: str = STAGES[0]) -> str:
    """A run with a long training stage; what comes before it is in DVC's cache."""
    ui.open_form("full")
    ui.choose("profile", "smoke")
    ui.choose("from_stage", from_stage)
    ui.choose("until_stage", "train_short")
    ui.add("overrides", LONG)
    return ui.submit()


# --- no call to any other host --------------------------------------------------------------------------------------


@in_browser
def test_nothing_was_asked_of_another_host(ui, finished, outside_calls):
    assert ui.outside == []
    assert not outside_calls.exists(), outside_calls.read_text()
    settings = httpx.get(f"{ui.address}/ui-settings").json()
    assert settings["available_uis"] == ["v1"]  # the pages of v2 would call a host outside


@in_browser
def test_a_page_that_calls_outside_is_stopped_and_noted(ui):
    before = len(ui.outside)
    ui.page.goto(ui.address)
    call = "url => fetch(url).then(() => 'answered', () => 'refused')"
    assert ui.page.evaluate(call, "https://example.org/") == "refused"  # by the policy of the dashboard's pages
    elsewhere = ui.context.new_page()
    assert elsewhere.evaluate(call, "https://example.org/") == "refused"  # by the test
    elsewhere.close()
    assert ui.outside[before:] == ["https://example.org/"]
    del ui.outside[before:]


@pytest.mark.parametrize(
    "attempt",
    [
        "socket.create_connection(('192.0.2.1', 80), 1)",
        "socket.getaddrinfo('example.org', 80)",
        "http('https://example.org/')",
    ],
)
def test_a_process_that_calls_outside_is_stopped_and_noted(tmp_path, attempt):
    code = f"import socket, urllib.request; http = urllib.request.urlopen; {attempt}"
    notes = tmp_path / "calls"
    environment = {**os.environ, "PYTHONPATH": str(LOOPBACK_ONLY), "OUTSIDE_CALLS": str(notes)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "this test allows no other host" in done.stderr
    assert ("example.org" if "example" in attempt else "192.0.2.1") in notes.read_text()


def test_a_process_may_call_this_machine(tmp_path):
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname())"
    environment = {**os.environ, "PYTHONPATH": str(LOOPBACK_ONLY), "OUTSIDE_CALLS": str(tmp_path / "calls")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not (tmp_path / "calls").exists()
