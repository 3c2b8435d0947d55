"""Ray Train runs a stage's work: in this process, on this machine's cores or GPUs, or on a cluster.

The work is a plain function of (arguments, ranks); one process can also call it directly. Ray starts the workers, joins
them in one torch process group, and starts all of them again when one is lost. The work itself finds the checkpoint
that it goes on from (elastic_core/training/checkpoint.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

import torch

from elastic_core.config import ConfigError
from elastic_core.errors import UserError
from elastic_core.io import storage
from elastic_core.training.checkpoint import CheckpointError, CheckpointUnavailable
from elastic_core.training.diagnosis import NonFiniteError
from elastic_core.training.distributed.ranks import Ranks
from tasks.runtime.exit_status import FULL_DISK, StageError, StageInterrupted
from tasks.runtime.ray_cluster import cluster, prepare
from tasks.settings.sections import Compute

Work = Callable[[dict, Ranks], None]


class Item(Protocol):
    """A part of a stage's work that any worker can do alone."""

    name: str
    needs: tuple[str, ...]


AGREE_SECONDS = 60  # that workers wait for each other to raise the same error
# Errors that every rank raises: a new start of the workers would only repeat them.
FINAL = (NonFiniteError, CheckpointError, UserError)
TEMPORARY = (CheckpointUnavailable, storage.StorageUnavailable)  # a later start of the stage may succeed


def launch(work: Work, arguments: dict, compute: Compute, name: str) -> None:
    """Run `work(arguments, ranks)` on every worker, in this directory; return when all have ended.

    `name` is the run's name in Ray. Raises StageError for an error that another start would repeat, StageInterrupted
    where a server was away or workers were lost more often than `compute.retries`, and ConfigError for a cluster that
    does not answer.
    """
    _check_gpu(compute)
    call = {"work": work, "arguments": arguments, "directory": os.getcwd(), "use_gpu": compute.gpus_per_worker > 0}
    # Ray is not needed in a single process, and its import takes a second. Under torchrun it joins the processes.
    is_single = not compute.workers and "RANK" not in os.environ
    problem = _worker(call) if is_single else _by_ray(call, compute, name)
    if problem is not None:
        text, temporary = problem
        raise StageInterrupted(text) if temporary else StageError(text)


def launch_items(
    work: Callable[[Item, torch.device], dict],
    items: Sequence[Item],
    compute: Compute,
    done: Callable[[Item, dict], None],
    finished: Collection[str] = (),
) -> None:
    """Call `work(item, device)` for every item, and `done(item, result)` in this process as soon as it has returned.

    An item has a `name`, and `needs`, the names of items that come first. Items in `finished` are done already. Without
    workers, this process works, in the order of the items. Otherwise every item is a task of Ray with a worker's CPUs
    and GPU, and as many run at once as there are workers.

    Raises what `work` raises, or StageError and StageInterrupted as `launch` does.
    """
    _check_gpu(compute)
    waiting = [item for item in items if item.name not in finished]
    if not waiting:
        return
    if not compute.workers:
        device = torch.device("cuda" if compute.gpus_per_worker else "cpu")
        for item in waiting:
            done(item, work(item, device))
        return
    with cluster(compute, prepare(compute)):
        _items_by_ray(work, waiting, compute, done, set(finished))


def _items_by_ray(work, waiting: list[Item], compute: Compute, done, finished: set[str]) -> None:
    import ray

    options = {"num_cpus": compute.cpus_per_worker, "num_gpus": compute.gpus_per_worker, "max_retries": compute.retries}
    remote, running = ray.remote(**options)(_item_worker), {}
    call = {"work": work, "directory": os.getcwd(), "use_gpu": compute.gpus_per_worker > 0}
    while waiting or running:
        for item in [item for item in waiting if finished.issuperset(item.needs)][: compute.workers - len(running)]:
            running[remote.remote(call, item)] = item
            waiting.remove(item)
        (ready,), _ = ray.wait(list(running))
        item = running.pop(ready)
        try:
            result, problem = ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            raise StageError(str(error)) from None  # with the worker's own traceback
        except ray.exceptions.RayError as error:
            raise StageInterrupted(
                f"{item.name}: its worker was lost {compute.retries + 1} times (compute.retries: {compute.retries}): "
                f"{error}. Start again: finished items are kept"
            ) from None
        if problem is not None:
            text, temporary = problem
            raise StageInterrupted(text) if temporary else StageError(text)
        finished.add(item.name)
        done(item, result)


def _item_worker(call: dict, item: Item) -> tuple[dict | None, tuple[str, bool] | None]:
    """One item on one worker: its result, and otherwise as `_worker`."""
    os.chdir(call["directory"])
    try:
        return call["work"](item, torch.device("cuda" if call["use_gpu"] else "cpu")), None
    except (*FINAL, OSError) as error:
        ending = _ending(error)
        if ending is None:
            raise
        return None, (str(ending), isinstance(ending, StageInterrupted))


def _check_gpu(compute: Compute) -> None:
    if compute.gpus_per_worker and not compute.workers and not torch.cuda.is_available():
        raise ConfigError(
            "compute.gpus_per_worker: got 1, but torch sees no CUDA device here; set it to 0, or workers above 0"
        )


def _by_ray(call: dict, compute: Compute, name: str) -> tuple[str, bool] | None:
    """Run the work on all workers by Ray Train; what one worker returns."""
    address = prepare(compute)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer

    logging.getLogger("ray").setLevel(logging.ERROR)
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
            return trainer.fit().return_value
        except TrainingFailedError as error:
            raise _given_up(error, compute.retries) from None


def _worker(call: dict) -> tuple[str, bool] | None:
    """Run the work on one worker. Returns None, or why the work failed and whether a later start may succeed."""
    os.chdir(call["directory"])
    ranks = Ranks.current(call["use_gpu"])
    try:
        call["work"](call["arguments"], ranks)
    except (*FINAL, OSError) as error:
        ending = _ending(error)
        if ending is None or not ranks.all_arrive_within(AGREE_SECONDS):
            raise  # to Ray, which ends the other workers: they are waiting for this one
        return str(ending), isinstance(ending, StageInterrupted)
    return None


def _ending(error: BaseException) -> StageError | None:
    """The stage's error for an error of its work; None for an unknown error."""
    if isinstance(error, FINAL):
        return StageInterrupted(str(error)) if isinstance(error, TEMPORARY) else StageError(str(error))
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return StageError(f"{error}; make space and start again: the run goes on from its last checkpoint")
    return None


def _given_up(error: Exception, retries: int) -> StageError:
    """The stage's error after the last of all starts that Ray may make."""
    failures = getattr(error, "worker_failures", {})
    # Ray's own errors stand for workers that died or no longer answer; the other workers fail because of them.
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
    """Whether a worker failed only because another worker no longer answered."""
    return isinstance(failure, torch.distributed.DistError) or "gloo" in str(failure)


def ray_storage(compute: Compute) -> str:
    """Where Ray keeps its own files about runs, beside the checkpoints."""
    place = storage.join(compute.storage, "ray")
    return place if storage.is_url(place) else str(Path(place).absolute())
