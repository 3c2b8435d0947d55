"""The job of a training stage: its key, the places of its files, and its start on the workers."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from elastic_core.io import storage
from elastic_core.io.digests import run_key
from elastic_core.training.distributed.ranks import Ranks
from elastic_core.training.stage import Stage
from tasks.progress.display import followed
from tasks.runtime.launch import launch
from tasks.runtime.run_lock import only_one
from tasks.settings import remote_checks
from tasks.settings.schema import Params

DATA = Path("artifacts/data")
# Files that only this machine needs: locks, metrics of unfinished runs, cached digests of files.
LOCAL = Path("checkpoints")


@dataclass(frozen=True)
class Job:
    """One run of a stage.

    `key` is a digest of everything that decides the result. A stage that is started again with the same key resumes its
    run; any change gives another key, and so a new run. `shown_by_launcher`: the process that launches the workers
    shows their progress.
    """

    name: str
    key: str
    shown_by_launcher: bool = False

    @property
    def directory(self) -> Path:
        """The directory of the run's metrics and its lock, on this machine."""
        return LOCAL / f"{self.name}-{self.key}"

    @property
    def metrics(self) -> Path:
        """The metrics of the run so far, one row per step."""
        return self.directory / "metrics.jsonl"

    @property
    def out(self) -> Path:
        """The directory of the stage's output."""
        return Path("artifacts") / self.name

    def checkpoints(self, settings: Params) -> str:
        """The directory or URL of the run's checkpoints.

        It is not an output of DVC, because DVC deletes a stage's outputs before it runs the stage again.
        """
        return storage.join(settings.compute.storage, f"{self.name}-{self.key}")


def make_job(settings: Params, name: str, configuration: dict, inputs: list[Path]) -> Job:
    """The job of a stage. Its key is a digest of seed, `configuration` and the contents of the data and `inputs`."""
    configuration = {"seed": settings.seed, **configuration}
    return Job(name, run_key(configuration, [DATA, *inputs], LOCAL / "digests.json"))


def run_stage(work: Callable[[dict, Ranks], None], settings: Params, job: Job, stage: Stage) -> None:
    """Run `work` on all workers and wait for the end.

    Workers in other processes have no terminal. So if this process has one, it shows their progress.

    Raises ConfigError if another process runs the same job, or if storage or cluster cannot be used. Raises StageError
    if the work fails.
    """
    remote_checks.check(settings, "compute")
    job = dataclasses.replace(job, shown_by_launcher=settings.compute.workers > 0 and sys.stderr.isatty())
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_one(job.directory, job.name))
        if job.shown_by_launcher:
            stack.enter_context(followed(job.name, stage, job.metrics))
        launch(work, {"settings": settings, "job": job}, settings.compute, f"{job.name}-{job.key}")
