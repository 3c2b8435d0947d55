"""Killed at any moment and started again, a stage ends at the same bits and leaves no process; many times: make soak.

Each test is a chain of real starts (see soak/). The chains share one prepared workspace and run two at a time.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("ray")
pytest.importorskip("prefect")
pytest.importorskip("dvc")

from tests.soak import checks
from tests.soak import workspace as spaces
from tests.soak.processes import marked
from tests.soak.server import prefect_server
from tests.soak.trials import Kill, killed_once

STEPS = 40  # with two workers a quarter of them
pytestmark = [pytest.mark.thorough, pytest.mark.slow, pytest.mark.kill, pytest.mark.server, pytest.mark.ray]
pytestmark += [pytest.mark.timeout(600)]


def flow(prepared):
    """In its second, sliced half; with the flow its guard, DVC and the stage have to end."""
    with prefect_server(prepared.directory / "server") as settings:
        return killed_once(prepared, "flow", Kill("SIGKILL", rows=27), **settings)


def worker(prepared):
    """One of two workers of Ray Train, which is replaced within the run."""
    spaces.make_reference(prepared, workers=2)
    return killed_once(prepared, "worker", Kill("SIGKILL", rows=6))


def two_runs_and_damage(prepared):
    with marked() as mark:
        return checks.two_runs_and_damage(prepared, prepared.directory / "damaged", mark)


def full_disk(prepared):
    """And killed with DVC, once there is space."""
    with marked() as mark:
        return checks.full_disk(prepared, prepared.directory / "full", mark, kills=(Kill("SIGKILL", rows=30),))


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """What each chain found wrong, by its name; the longest begins first."""
    prepared = spaces.prepare(tmp_path_factory.mktemp("kill"), STEPS)
    with ThreadPoolExecutor(2) as pool:
        yield {chain: pool.submit(chain, prepared) for chain in (worker, two_runs_and_damage, full_disk, flow)}


def test_a_second_run_is_refused_and_damaged_checkpoints_are_passed_over(chains):
    """The driver: SIGKILL, and the newest checkpoint is cut off; SIGTERM, and a bit of it is turned."""
    assert chains[two_runs_and_damage].result() == []


def test_a_full_disk_ends_the_run_and_space_lets_it_go_on(chains):
    try:
        assert chains[full_disk].result() == []
    except PermissionError as error:
        pytest.skip(str(error))


def test_a_killed_flow_goes_on(chains):
    assert chains[flow].result() == []


def test_a_killed_worker_is_resumed_within_the_run(chains):
    assert chains[worker].result() == []
