"""One process at a time works on a run: leases on disk and on an S3 server, of this machine and of others."""

import itertools
import os
import resource
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


def test_a_run_of_another_machine_is_seen_alive_and_taken_over_when_it_is_dead(place, holder, monkeypatch):
    first, waited = holder("elsewhere"), []
    monkeypatch.setattr(lock, "EXPIRE_SECONDS", 20)  # it returns at the first sign of life
    begin = time.monotonic()
    with pytest.raises(Held, match=f"process {first.pid} of"):
        take(place, waited.append)
    assert time.monotonic() - begin < lock.EXPIRE_SECONDS and len(waited) == 1
    monkeypatch.setattr(lock, "EXPIRE_SECONDS", 2.5)
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
        assert lost.wait(30)
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


def end_of(lease, seconds: float) -> list[str]:
    """Why the holder of a lease is told within these seconds that it has lost it; empty if it is not."""
    reasons, lost = [], threading.Event()
    with kept(lease, lambda reason: reasons.append(reason) or lost.set()):
        lost.wait(seconds)
    return reasons


def test_a_full_disk_ends_nobody_but_a_successor_and_a_server_that_is_away_do(place, monkeypatch):
    seconds = 0.8 if storage.is_url(place) else 3  # on a disk, no end may come
    monkeypatch.setattr(lock, "EXPIRE_SECONDS", seconds)
    lease, write = take(place), storage.write_bytes

    def full(location, data):
        raise storage.StorageError(f"{location}: cannot write it: No space left on device")

    monkeypatch.setattr(storage, "write_bytes", full)
    ends = end_of(lease, 30 if storage.is_url(place) else 1.2 * seconds)
    if storage.is_url(place):
        assert ends == ["no sign of life could be written for 0.8 s, so another process may have taken over"]
        return
    assert not ends
    lease = take(place)
    monkeypatch.setattr(storage, "write_bytes", write)
    with monkeypatch.context() as patch:
        patch.setattr(lock, "_machine", lambda: "another machine")
        take(place)
    monkeypatch.setattr(storage, "write_bytes", full)
    lease.last_beat = lock.now()
    (end,) = end_of(lease, 5)
    assert end == f"process {os.getpid()} of {lease.owner['host']} has taken over"


def test_a_lease_that_could_not_be_written_holds_nothing(tmp_path):
    """As on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, limits[1]))  # bytes of a file
    try:
        with pytest.raises(storage.StorageError, match="cannot write it: File too large"):
            take(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert storage.list_names(tmp_path) == [] and lock.holder_of(tmp_path) is None


def test_time_counts_from_before_a_sign_of_life_and_while_the_machine_is_suspended(tmp_path, monkeypatch):
    lease, asked, twice = take(tmp_path), [], threading.Event()
    is_stored, gettime, suspended, reasons = lease.is_stored, time.clock_gettime, [], []

    def slowly():
        asked.append((lock.now(), lease.last_beat))
        time.sleep(0.1)
        if len(asked) == 3:  # two are complete
            twice.set()
        return is_stored()

    monkeypatch.setattr(lease, "is_stored", slowly)
    with kept(lease, lambda reason: reasons.append(reason)):
        assert twice.wait(30)
    assert not reasons
    for (now, _), (_, last_beat) in itertools.pairwise(asked):
        assert last_beat <= now
    lease = take(tmp_path)
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 10.0)
    monkeypatch.setattr(time, "clock_gettime", lambda clock: gettime(clock) + sum(suspended))
    suspended.append(1000.0 if hasattr(time, "CLOCK_BOOTTIME") else 0.0)
    assert end_of(lease, 2) != [] or not hasattr(time, "CLOCK_BOOTTIME")
