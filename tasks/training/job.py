"""A training stage's run by name: its key, its lock, where its files are, and its start on every worker."""

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

DATA, RANK = Path("artifacts/data"), Path("artifacts/rank")
LOCAL = Path("checkpoints")  # what only this machine needs: locks, metrics of runs that are under way, digests


@dataclass(frozen=True)
class Job:
    """A stage's run by name; `key` is a digest of everything that decides its result."""

    name: str
    key: str
    followed: bool = False  # on a terminal, by the process that launched it

    @property
    def directory(self) -> Path:
        """Where the run's metrics and its lock are."""
        return LOCAL / f"{self.name}-{self.key}"

    @property
    def metrics(self) -> Path:
        """The rows of the run so far, one a step."""
        return self.directory / "metrics.jsonl"

    @property
    def out(self) -> Path:
        """The stage's output."""
        return Path("artifacts") / self.name

    def checkpoints(self, settings: Params) -> str:
        """Where its checkpoints are: outside DVC's outputs, so that DVC does not delete them before a new start."""
        return storage.join(settings.compute.storage, f"{self.name}-{self.key}")


def make_job(settings: Params, name: str, configuration: dict, inputs: list[Path]) -> Job:
    """The job of a stage: keyed by seed, configuration and the contents of its inputs."""
    configuration = {"seed": settings.seed, **configuration}
    return Job(name, run_key(configuration, [DATA, *inputs], LOCAL / "digests.json"))


def run_stage(work: Callable[[dict, Ranks], None], settings: Params, job: Job, stage: Stage) -> None:
    """Launch a job's work, alone. Raises StageError or ConfigError that says what is wrong.

    Workers elsewhere have no terminal: where there is one here, this process shows their rows.
    """
    remote_checks.check(settings, "compute")
    job = dataclasses.replace(job, followed=settings.compute.workers > 0 and sys.stderr.isatty())
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_one(job.directory, job.name))
        if job.followed:
            stack.enter_context(followed(job.name, stage, job.metrics))
        launch(work, {"settings": settings, "job": job}, settings.compute, f"{job.name}-{job.key}")
