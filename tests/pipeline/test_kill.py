"""A killed worker of Ray Train is replaced, and the run ends at the same bits (other kills: test_kill_kinds.py)."""

import pytest

pytest.importorskip("ray")

from tests.soak import workspace as spaces
from tests.soak.trials import Kill, killed_once

STEPS = 40  # with two workers a quarter of them
pytestmark = [pytest.mark.slow, pytest.mark.kill, pytest.mark.ray, pytest.mark.timeout(300)]


def test_a_killed_worker_is_resumed_within_the_run(tmp_path):
    prepared = spaces.prepare(tmp_path, STEPS)
    spaces.make_reference(prepared, workers=2)
    assert killed_once(prepared, "worker", Kill("SIGKILL", rows=6)) == []
