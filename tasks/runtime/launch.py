"""Ray Train runs a stage's work: in this process, on this machine's cores or GPUs, or on a cluster.

The work is a plain function of (arguments, ranks), which a single process can call directly as well. Ray starts the
workers, joins them to one torch process group, and starts all of them again when one is lost; where the work goes on
from is the work's own business (elastic_core/training/checkpoint.py).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from elastic_core.config import ConfigError, require
from elastic_core.io import storage
from elastic_core.training.checkpoint import CheckpointError, CheckpointUnavailable
from elastic_core.training.diagnosis import NonFiniteError
from elastic_core.training.distributed.placement import Execution, Ranks
from tasks.runtime.ray_cleanup import nothing_left

Work = Callable[[dict, Ranks], None]

ANSWER_SECONDS = 8  # for a cluster to show that it is there
HTTP2_SETTINGS = 4  # the type of a frame, its fourth byte (RFC 9113)
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, HTTP2_SETTINGS, 0, 0, 0, 0, 0])
AGREE_SECONDS = 60  # for all workers to come to the same error
# Where every rank raises one of these, starting the workers again would only repeat it.
FINAL = (NonFiniteError, CheckpointError, ConfigError, storage.StorageError)
TEMPORARY = (CheckpointUnavailable, storage.StorageUnavailable)  # of these, what the whole stage may get over later
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class StageError(RuntimeError):
    """A stage's work ended for a reason that trying again does not mend."""


class StageInterrupted(StageError):
    """A stage's work ended for a reason that trying again may mend: a server was away, or workers were lost."""


@dataclass(frozen=True)
class Compute:
    """Where and how the training stages and the calibration run. Changes no result beyond rounding, and re-runs none.

    `workers` 0 works in this process. `retries`: how often all workers are started again after one was lost.
    `storage`: where checkpoints go, a directory or a URL, which every worker must reach.
    """

    workers: int = 0
    cpus_per_worker: int = 1
    gpus_per_worker: int = 0
    retries: int = 2
    storage: str = "checkpoints"
    execution: Execution = field(default_factory=Execution)

    def check(self) -> None:
        require(self.workers >= 0, "workers", self.workers, "0 (in this process), or more")
        require(self.cpus_per_worker >= 1, "cpus_per_worker", self.cpus_per_worker, "1 or more")
        require(self.gpus_per_worker in (0, 1), "gpus_per_worker", self.gpus_per_worker, "0 or 1: a worker has one GPU")
        require(self.retries >= 0, "retries", self.retries, "0 or more")
        # torchrun may have started this process among others, which then are the workers.
        shards, workers = self.execution.shard_over, self.workers or int(os.environ.get("WORLD_SIZE", 1))
        divides = shards is None or workers % shards == 0
        require(divides, "execution.shard_over", shards, f"null, or a divisor of the number of workers ({workers})")


def launch(work: Work, arguments: dict, compute: Compute, name: str) -> None:
    """Run `work(arguments, ranks)` on every worker, in this directory; returns when all have ended.

    `name` is the run's in Ray. Raises StageError for what would only happen again, StageInterrupted where a server was
    away or workers were lost more often than `compute.retries`, and ConfigError for a cluster that is not there.
    """
    if compute.gpus_per_worker and not compute.workers and not torch.cuda.is_available():
        raise ConfigError(
            "compute.gpus_per_worker: got 1, but torch sees no CUDA device here; set it to 0, or workers above 0"
        )
    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
    address = os.environ.get("RAY_ADDRESS")
    if compute.workers and address not in (None, "", "local"):
        check_cluster(address)
        if has_token():  # Ray's clusters ask for one by default; a client has to be told, before it is imported
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer

    logging.getLogger("ray").setLevel(logging.ERROR)
    call = {"work": work, "arguments": arguments, "directory": os.getcwd(), "use_gpu": compute.gpus_per_worker > 0}
    resources = {"CPU": compute.cpus_per_worker} | ({"GPU": 1} if compute.gpus_per_worker else {})
    trainer = TorchTrainer(
        _worker,
        train_loop_config=call,
        torch_config=TorchConfig(backend="nccl" if compute.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=compute.workers,
            use_gpu=compute.gpus_per_worker > 0,
            resources_per_worker=resources if compute.workers else None,
        ),
        run_config=RunConfig(
            name=name, storage_path=ray_storage(compute), failure_config=FailureConfig(max_failures=compute.retries)
        ),
    )
    with cluster(compute, address) if compute.workers else contextlib.nullcontext():
        try:
            problem = trainer.fit().return_value
        except TrainingFailedError as error:
            raise _given_up(error, compute.retries) from None
    if problem is not None:
        text, temporary = problem
        raise StageInterrupted(text) if temporary else StageError(text)


def _worker(call: dict) -> tuple[str, bool] | None:
    """What every worker does; returns why the work cannot be done, if so, and whether that may change by itself."""
    os.chdir(call["directory"])
    ranks = Ranks.current(call["use_gpu"])
    try:
        call["work"](call["arguments"], ranks)
    except (*FINAL, OSError) as error:
        ending = _ending(error)
        if ending is None or not ranks.everybody_comes(AGREE_SECONDS):
            raise  # to Ray, which ends the others: they wait for this one elsewhere
        return str(ending), isinstance(ending, StageInterrupted)
    return None


def _ending(error: BaseException) -> StageError | None:
    """How a stage ends by an error of its work, in our words; None where these are not known."""
    if isinstance(error, FINAL):
        return StageInterrupted(str(error)) if isinstance(error, TEMPORARY) else StageError(str(error))
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return StageError(f"{error}; make space and start again: the run goes on from its last checkpoint")
    return None


def _given_up(error: Exception, retries: int) -> StageError:
    """How a stage ends that Ray has started again as often as it may, by how the last time ended."""
    failures = getattr(error, "worker_failures", {})
    # Ray's own errors are of workers that died or no longer answer; the others then fail for want of them.
    dead = [rank for rank, failure in failures.items() if type(failure).__module__.startswith("ray.")]
    endings = [ending for failure in failures.values() if (ending := _ending(failure)) is not None]
    if endings and not dead:
        return endings[0]
    if dead or (failures and all(map(_is_of_another, failures.values()))):
        which = ", ".join(map(str, sorted(dead or failures)))
        return StageInterrupted(
            f"workers were lost {retries + 1} times (compute.retries: {retries}), the last time worker {which}; see "
            "above what Ray says of it. Start again: the run goes on from its last checkpoint"
        )
    return StageError(str(error))  # with the worker's own traceback


def _is_of_another(failure: BaseException) -> bool:
    """Whether a worker failed because another one no longer answered."""
    return isinstance(failure, torch.distributed.DistError) or "gloo" in str(failure)


def ray_storage(compute: Compute) -> str:
    """Where Ray keeps its own notes about runs, beside the checkpoints."""
    place = storage.join(compute.storage, "ray")
    return place if storage.is_url(place) else str(Path(place).absolute())


@contextlib.contextmanager
def cluster(compute: Compute, address: str | None) -> Iterator[None]:
    """The cluster at `address`, or one on this machine for as long as the block runs."""
    import ray

    environment = {
        "env_vars": {**ENVIRONMENT, "PYTHONPATH": python_path()},
        "worker_process_setup_hook": "tasks.runtime.ray_logging.quiet",
    }
    options = {"logging_level": "ERROR", "runtime_env": environment}
    if address in (None, "", "local"):
        cores = max(os.cpu_count() or 1, compute.workers * compute.cpus_per_worker)
        options |= {"address": "local", "include_dashboard": False, "num_cpus": cores}
    else:
        options["address"] = address
    with nothing_left() if "num_cpus" in options else contextlib.nullcontext():
        try:
            ray.init(**options)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            raise ConfigError(
                f"RAY_ADDRESS: {address} does not let this process in ({error}); it needs the cluster's Ray version "
                "and token (~/.ray/auth_token, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH)"
            ) from None
        try:
            yield
        finally:
            ray.shutdown()


def has_token() -> bool:
    """Whether a token for a Ray cluster is where Ray looks for one."""
    named = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return named or (Path.home() / ".ray" / "auth_token").is_file()


def python_path() -> str:
    """Workers import this checkout, whichever one is installed there."""
    return os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])


def check_cluster(address: str) -> None:
    """ConfigError unless something that may be Ray answers at `address` within ten seconds: Ray would wait for minutes.

    Ray speaks gRPC, and so HTTP/2, whose servers greet with a SETTINGS frame. Whether it is Ray, of this version, and
    lets us in, Ray says at once itself.
    """
    advice = "start it, correct RAY_ADDRESS, or unset it to use this machine"
    if address == "auto":
        return  # Ray itself says at once where there is none on this machine
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"RAY_ADDRESS: got {address!r}; allowed: HOST:PORT, ray://HOST:PORT, auto or local")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS / 2) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            connection.sendall(HTTP2_GREETING)
            answer = connection.recv(9, socket.MSG_WAITALL)
    except OSError as error:
        raise ConfigError(f"RAY_ADDRESS: no Ray cluster answers at {address} ({error}); {advice}") from None
    if len(answer) < 9 or answer[3] != HTTP2_SETTINGS:
        raise ConfigError(f"RAY_ADDRESS: what listens at {address} is no Ray cluster; {advice}")


@contextlib.contextmanager
def only_one(directory: Path, what: str) -> Iterator[None]:
    """Hold `directory` for this process; ConfigError where another one holds it."""
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes the first one holds it for all
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"{what} already runs with these parameters and inputs (process {file.read().strip()}, which holds "
                f"{file.name}); wait for it, or stop it"
            ) from None
        file.truncate(0)
        print(os.getpid(), file=file, flush=True)
        yield
