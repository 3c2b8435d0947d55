"""Where the work runs: in this process, on Ray workers, or nowhere, and then it says so soon."""

import errno
import functools
import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError

from elastic_core.config import ConfigError, load
from elastic_core.errors import UserError
from elastic_core.io.storage import StorageError, StorageUnavailable
from elastic_core.training.checkpoint import CheckpointError, CheckpointUnavailable
from elastic_core.training.diagnosis import NonFiniteError
from tasks.runtime import ray_cluster
from tasks.runtime.exit_status import StageError, StageInterrupted
from tasks.runtime.launch import _given_up, launch, launch_items
from tasks.runtime.ray_cleanup import VARIABLE, nothing_left
from tasks.settings.sections import Compute
from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_no_workers_is_this_process(tmp_path, no_cluster):
    seen = []

    def work(arguments, ranks):
        seen.append((arguments, ranks.rank, ranks.world, ranks.is_distributed, os.getpid()))

    launch(work, {"name": "x"}, Compute(storage=str(tmp_path)), "test")
    assert seen == [({"name": "x"}, 0, 1, False, os.getpid())]


@dataclass(frozen=True)
class Item:
    name: str
    needs: tuple[str, ...] = ()


def work_on_item(directory, item, device):
    """A file for every item, and its result; the last item fails."""
    started = sorted(path.name for path in directory.iterdir())
    (directory / item.name).touch()
    if item.name == "last":
        raise UserError("last: cannot be")
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    return {"process": os.getpid(), "device": str(device), "there": started, "niceness": niceness}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.ray)])
def test_items_run_on_workers_in_the_order_of_their_needs(workers, tmp_path, no_cluster):
    """Finished items are not computed again, and an error of one has its own text."""
    found, items = {}, [Item("a"), Item("b"), Item("c", ("a", "b")), Item("old"), Item("last", ("c", "old"))]
    with pytest.raises(StageError if workers else UserError, match=r"^last: cannot be$"):
        launch_items(
            functools.partial(work_on_item, tmp_path),
            items,
            Compute(workers=workers, storage=str(tmp_path / "storage")),
            lambda item, result: found.update({item.name: result}),
            finished={"old"},
        )
    assert sorted(found) == ["a", "b", "c"] and not (tmp_path / "old").exists()
    assert {"a", "b"} <= set(found["c"]["there"]) and found["a"]["device"] == "cpu"
    assert (found["a"]["process"] == os.getpid()) == (workers == 0)
    # Ray's workers would be nice to every other process on the machine, and hardly run beside a busy one.
    assert found["a"]["niceness"] == os.getpriority(os.PRIO_PROCESS, 0)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (NonFiniteError("the loss is nan"), StageError, "^the loss is nan$"),
        (ConfigError("seed: got -1"), StageError, "^seed: got -1$"),
        (UserError("rank: the head is zero"), StageError, "^rank: the head is zero$"),
        (CheckpointError("step 3 could not"), StageError, "^step 3 could not$"),
        (StorageError("s3://a: no such bucket"), StageError, "^s3://a: no such bucket$"),
        (FULL, StageError, r"^\[Errno 28\] No space left on device; make space and start again: "),
        (CheckpointUnavailable("step 3: no answer"), StageInterrupted, "^step 3: no answer$"),
        (StorageUnavailable("s3://a: no answer"), StageInterrupted, "^s3://a: no answer$"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_starting_the_workers_again_does_not_mend_ends_the_stage(tmp_path, no_cluster, error, kind, words):
    def work(arguments, ranks):
        raise error

    with pytest.raises(StageError, match=words) as caught:
        launch(work, {}, Compute(storage=str(tmp_path)), "test")
    assert type(caught.value) is kind


DEAD = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())
CLOSED = RuntimeError("[…/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:47528.")


@pytest.mark.parametrize(
    ("failures", "kind", "words"),
    [
        ({1: DEAD}, StageInterrupted, r"^workers were lost 3 times \(compute\.retries: 2\), the last time worker 1; "),
        ({0: CLOSED, 1: DEAD}, StageInterrupted, "the last time worker 1; "),
        ({0: FULL, 1: DEAD}, StageInterrupted, "the last time worker 1; "),
        ({0: CLOSED, 2: CLOSED}, StageInterrupted, "the last time worker 0, 2; "),
        ({0: FULL}, StageError, "No space left on device; make space"),
        ({0: CLOSED, 1: FULL}, StageError, "No space left on device; make space"),
        ({0: StorageUnavailable("s3://a: no answer")}, StageInterrupted, "^s3://a: no answer$"),
        ({0: CLOSED, 1: KeyError("key")}, StageError, "Training failed due to worker errors:\nthe traceback"),
    ],
)
def test_what_ray_gives_up_says_whether_workers_were_lost(failures, kind, words):
    """With the errors that Ray 2.60 collects: of a killed worker, of the others, of the work itself."""
    ending = _given_up(WorkerGroupError("the traceback", failures), 2)
    assert type(ending) is kind and re.search(words, str(ending))


def other_server(answer: bytes = b""):
    """A port that accepts connections and answers something else, or never."""
    server = socket.create_server(("127.0.0.1", 0))
    open_connections = []

    def serve():
        while True:
            connection, _ = server.accept()
            connection.sendall(answer)
            open_connections.append(connection)

    threading.Thread(target=serve, daemon=True).start()
    return server.getsockname()[1]


@pytest.mark.parametrize(
    "address, words",
    [
        (
            lambda: f"127.0.0.1:{free_port()}",
            r"no Ray cluster answers at 127\.0\.0\.1:\d+ \(.*refused\); start it, corr",
        ),
        (lambda: f"ray://127.0.0.1:{free_port()}", r"no Ray cluster answers at ray://127\.0\.0\.1"),
        (lambda: f"127.0.0.1:{other_server()}", r"no Ray cluster answers at 127\.0\.0\.1:\d+ \(timed out\)"),
        (lambda: f"127.0.0.1:{other_server(b'HTTP/1.1 400 Bad Request')}", r"what listens at .* is no Ray cluster"),
        (lambda: "somewhere", r"got 'somewhere'; allowed: HOST:PORT, ray://HOST:PORT, auto or local"),
    ],
    ids=["dead", "dead client", "deaf", "other", "no address"],
)
def test_a_dead_address_is_reported_within_ten_seconds(monkeypatch, tmp_path, address, words):
    assert ray_cluster.ANSWER_SECONDS < 10
    monkeypatch.setattr(ray_cluster, "ANSWER_SECONDS", 2)
    monkeypatch.setenv("RAY_ADDRESS", address())
    start = time.monotonic()
    with pytest.raises(ConfigError, match="RAY_ADDRESS: " + words):
        launch(lambda *_: None, {}, Compute(workers=1, storage=str(tmp_path)), "test")
    assert time.monotonic() - start < 10  # two of them for the answer; Ray itself waits for minutes


def test_an_address_does_not_matter_without_workers(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    launch(lambda *_: None, {}, Compute(storage=str(tmp_path)), "test")


# Ray reads its environment when it is imported, so a process of its own.
ATTACH = """
import os
import sys
from pathlib import Path

import torch

from elastic_core.training.diagnosis import NonFiniteError
from tasks.runtime.exit_status import StageError
from tasks.runtime.launch import launch
from tasks.settings.sections import Compute


def record(arguments, ranks):
    # What a worker is; adds up over all of them.
    total = ranks.sum(torch.tensor(ranks.rank + 1.0))
    path = Path(arguments["out"]) / f"{ranks.rank}-{os.getpid()}"
    path.write_text(f"{ranks.world} {total.item()} {os.getcwd()}")
    raise NonFiniteError("the loss is nan")


out, compute = Path(sys.argv[1]), Compute(workers=2, storage=sys.argv[1] + "/storage")
try:
    launch(record, {"out": str(out / "found")}, compute, "fails")
except StageError as error:
    print("StageError:", error)
"""


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.ray
def test_workers_attach_to_a_running_cluster(tmp_path):
    """Two workers of a cluster that was there before, in the driver's directory; their final error is not tried again.

    Work that ends well on workers is what tests/pipeline/test_kill.py compares (thorough).
    """
    ray, port = [sys.executable, "-m", "ray.scripts.scripts"], free_port()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}  # other tests keep the cores busy
    start = [*ray, "start", "--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
    (tmp_path / "found").mkdir()
    # `ray stop` would end every cluster of this machine.
    with nothing_left():
        environment[VARIABLE] = os.environ[VARIABLE]
        subprocess.run([*start, "--disable-usage-stats"], env=environment, check=True, capture_output=True, timeout=60)
        environment["RAY_ADDRESS"] = f"127.0.0.1:{port}"
        command = [sys.executable, "-c", ATTACH, str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "StageError: the loss is nan\n" in done.stdout
    files = sorted((tmp_path / "found").iterdir())
    assert [path.name[0] for path in files] == ["0", "1"]  # once, by two processes
    assert {path.read_text() for path in files} == {f"2 3.0 {ROOT}"}


def test_wrong_settings_are_refused():
    for values, words in [
        ({"workers": -1}, "workers: got -1; allowed: 0"),
        ({"gpus_per_worker": 2}, "gpus_per_worker: got 2; allowed: 0 or 1"),
        (
            {"workers": 4, "execution": {"shard_over": 3}},
            r"execution.shard_over: got 3; allowed: null, or a divisor of the number of workers \(4\)",
        ),
        ({"execution": {"shard_over": 0}}, "shard_over: got 0"),
        ({"workres": 1}, "workres: unknown parameter; did you mean 'workers'"),
    ]:
        with pytest.raises(ConfigError, match=words):
            load(Compute, values, "params.yaml: compute")
