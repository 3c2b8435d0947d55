"""Starts a training stage: its job, its workers and the display of their progress."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable

from elastic_core.training.distributed.ranks import Ranks
from elastic_core.training.stage import Stage
from tasks.progress.display import followed
from tasks.runs import job as jobs
from tasks.runtime.launch import launch
from tasks.settings import remote_checks
from tasks.settings.schema import Params


def run_stage(work: Callable[[dict, Ranks], None], settings: Params, name: str, stage: Stage) -> None:
    """Run `work` on all workers and wait for the end.

    Workers in other processes have no terminal. So if this process has one, it shows their progress.

    Raises ConfigError if another process runs the same job, or if storage or cluster cannot be used. Raises StageError
    if the work fails.
    """
    remote_checks.check(settings, "compute")
    with contextlib.ExitStack() as stack:
        job = stack.enter_context(jobs.started(name, settings))
        if settings.compute.workers > 0 and sys.stderr.isatty():
            job = dataclasses.replace(job, shown_by_launcher=True)
            stack.enter_context(followed(job.name, stage, job.metrics))
        launch(work, {"settings": settings, "job": job}, settings.compute, f"{job.name}-{job.key}")
