"""Runs jobs, several at a time, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.evidence.jobs import Job
from elastic_core.errors import UserError
from elastic_core.io.json_files import read_json
from tasks.progress.durations import duration
from tasks.runtime.environment import DEFAULTS
from tasks.settings.merging import ROOT

LOOK_SECONDS = 0.2
RATE = 6e9  # parameters × tokens per second of one process, before any job has ended: one core of an AMD EPYC
OVERHEAD = 25.0  # seconds of a job besides its training: start, measurement
LOG = "log.txt"


def results_of(root: Path, jobs: Iterable[Job]) -> dict[str, dict]:
    """Digest → result of the jobs that are done."""
    paths = {job.digest: root / f"{job.digest}.json" for job in jobs}
    return {digest: read_json(path) for digest, path in paths.items() if path.is_file()}


def seconds_per_work(results: Mapping[str, dict]) -> float:
    """Seconds of one process for one unit of work, by the results so far."""
    done = [(result["training_seconds"], result["job"]["work"]) for result in results.values() if "members" in result]
    seconds, work = (sum(column) for column in zip(*done, strict=True)) if done else (1.0, RATE)
    return seconds / work


def estimate(jobs: Iterable[Job], results: Mapping[str, dict], processes: int) -> float:
    """Seconds until all jobs are done."""
    rate = seconds_per_work(results)
    return sum(OVERHEAD + rate * job.work for job in jobs if job.digest not in results) / processes


class Processes:
    """The processes of the jobs that run now."""

    def __init__(self, root: Path, prepare, number: int):
        self.root, self.prepare, self.number = root, prepare, number
        self.running: dict[str, tuple[subprocess.Popen, Job]] = {}

    def start(self, job: Job) -> None:
        """Start a job. What it prints goes to a file in its directory."""
        directory = self.prepare(self.root, job)
        environment = {**DEFAULTS, **os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.evidence.work", str(directory.resolve())]
        with open(directory / LOG, "ab") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        self.running[job.digest] = process, job

    def ended(self) -> list[Job]:
        """The jobs whose processes have ended since the last call. Raises UserError for one that failed."""
        found = [(process, job) for process, job in self.running.values() if process.poll() is not None]
        for process, job in found:
            del self.running[job.digest]
            if process.returncode:
                log = self.root / job.digest / LOG
                lines = log.read_text(errors="replace").strip().splitlines()[-5:]
                raise UserError(f"{job.title}: ended with status {process.returncode} ({log}): {' | '.join(lines)}")
        return [job for _, job in found]

    def stop(self) -> None:
        """End the processes. What they have done is in their checkpoints."""
        for process, _ in self.running.values():
            process.terminate()
        for process, _ in self.running.values():
            process.wait()


def run(jobs: list[Job], root: Path, prepare, processes: int, say=print) -> dict[str, dict]:
    """Run the jobs that are not done yet; the results of all by digest. Raises UserError when one fails.

    A job starts when those that it needs are done. `prepare` makes the directory of a job.
    """
    jobs = list({job.digest: job for job in jobs}.values())
    results = results_of(root, jobs)
    waiting = [job for job in jobs if job.digest not in results]
    pool, begin, finished = Processes(root, prepare, processes), time.monotonic(), 0
    say(
        f"{len(jobs)} jobs, {len(results)} done before; about {duration(estimate(waiting, results, processes))} with "
        f"{processes} processes"
    )
    try:
        while waiting or pool.running:
            for job in [job for job in waiting if all(digest in results for digest in job.after)]:
                if len(pool.running) < processes:
                    pool.start(job)
                    waiting.remove(job)
            time.sleep(LOOK_SECONDS)
            for job in pool.ended():
                results |= results_of(root, [job])
                finished += 1
                left = estimate([*waiting, *(other for _, other in pool.running.values())], results, processes)
                took = duration(results[job.digest]["seconds"])
                rate = 3600 * finished / (time.monotonic() - begin)
                say(f"{len(results)} of {len(jobs)} jobs, {job.title}: {took}; {rate:.1f} jobs per hour, about "
                    f"{duration(left)} left")  # fmt: skip
    finally:
        pool.stop()
    return results
