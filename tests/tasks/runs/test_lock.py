"""One process at a time works on a run: leases on disk and on an S3 server, of this machine and of others."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from elastic_core.config import ConfigError
from elastic_core.io import storage
from tasks.runs import lock
from tasks.runs.lock import Held, kept, only_one, take

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import sys, time
from tasks.runs import lock
lock.HEARTBEAT_SECONDS = 0.2
if len(sys.argv) > 2:
    lock._machine = lambda: "another machine"
with lock.only_one(sys.argv[1], "train_short"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("HEARTBEAT_SECONDS", 0.2), ("EXPIRE_SECONDS", 2.5), ("LOOK_SECONDS", 0.1)):
        monkeypatch.setattr(lock, name, seconds)


@pytest.fixture
def holder(place):
    """Starts another process that holds `place`, of this or of another machine."""
    started = []

    def start(*arguments):
        command = [sys.executable, "-c", HOLD, place, *arguments]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_second_run_is_told_who_holds_it_and_a_dead_one_disturbs_nobody(place, holder):
    first = holder()
    words = rf"^train_short already runs .*\(process {first.pid} of .*, which holds {place}\)"
    with pytest.raises(ConfigError, match=words), only_one(place, "train_short"):
        pytest.fail("held twice")
    first.kill()
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is a zombie until it is waited for
    with only_one(place, "train_short"):
        assert lock.holder_of(place) is not None
    assert lock.holder_of(place) is None and storage.list_names(place) == []


def test_a_run_of_another_machine_is_seen_alive_and_taken_over_when_it_is_dead(place, holder):
    first, waited = holder("elsewhere"), []
    begin = time.monotonic()
    with pytest.raises(Held, match=f"process {first.pid} of"):
        take(place, waited.append)
    assert time.monotonic() - begin < lock.EXPIRE_SECONDS and len(waited) == 1
    first.kill()
    first.wait()
    begin = time.monotonic()
    lease = take(place)
    assert time.monotonic() - begin >= lock.EXPIRE_SECONDS
    assert lease.number == 2 and lease.is_stored()


def test_a_holder_that_slept_is_told_that_it_has_lost(place, monkeypatch):
    """For instance a machine that was suspended: it must not write over what its successor writes."""
    lease, lost = take(place), threading.Event()
    monkeypatch.setattr(lock, "_machine", lambda: "another machine")
    successor = take(place)  # nobody has kept the first one alive
    with kept(lease, lambda holder: lost.set()):
        assert lost.wait(5)
    assert successor.is_stored()


def test_of_many_that_start_at_once_one_gets_it(place):
    results, barrier = [], threading.Barrier(6)

    def attempt():
        barrier.wait()
        try:
            results.append(take(place))
        except Held:
            results.append(None)

    threads = [threading.Thread(target=attempt) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [lease is not None for lease in results].count(True) == 1
