"""Runs jobs, several at a time, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from benchmarks.evidence.jobs import Job
from elastic_core.io.json_files import read_json
from tasks.progress.durations import duration
from tasks.runtime.environment import DEFAULTS
from tasks.settings.merging import ROOT

LOOK_SECONDS = 0.2
RATE = 5.5e9  # parameters × tokens per second of one process, before any job has ended: one core of an AMD EPYC
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
    return sum(OVERHEAD + rate * job.work for job in jobs if job.digest not in results) / max(1, processes)


class Processes:
    """The processes of the jobs that run now."""

    def __init__(self, root: Path, prepare: Callable[[Path, Job], Path]):
        self.root, self.prepare = root, prepare
        self.running: dict[str, tuple[subprocess.Popen, Job]] = {}

    def start(self, job: Job) -> None:
        """Start a job. What it prints goes to a file in its directory."""
        directory = self.prepare(self.root, job)
        environment = {**DEFAULTS, **os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.evidence.work", str(directory.resolve())]
        with open(directory / LOG, "ab") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        self.running[job.digest] = process, job

    def ended(self) -> list[tuple[Job, str | None]]:
        """The jobs whose processes have ended since the last call, each with its problem, or None."""
        found = [(process, job) for process, job in self.running.values() if process.poll() is not None]
        for _, job in found:
            del self.running[job.digest]
        return [(job, self._problem(job, process.returncode) if process.returncode else None) for process, job in found]

    def _problem(self, job: Job, status: int) -> str:
        log = self.root / job.digest / LOG
        end = " | ".join(log.read_text(errors="replace").strip().splitlines()[-5:])
        return f"{job.title}: ended with status {status} ({log}): {end}"

    def stop(self) -> None:
        """End the processes. What they have done is in their checkpoints."""
        for process, _ in self.running.values():
            process.terminate()
        for process, _ in self.running.values():
            process.wait()


def show(text: str) -> None:
    """Print a line at once, also to a file."""
    print(text, flush=True)


def run(
    jobs: Iterable[Job],
    root: Path,
    prepare: Callable[[Path, Job], Path],
    do: Callable[[Path], dict],
    processes: int,
    say: Callable[[str], None] = show,
) -> list[str]:
    """Run the jobs that are not done yet. Returns the problems of those that failed; jobs that need them are left out.

    - `jobs`: those that others need come before them.
    - `prepare` makes the directory of a job, and `do` does the job of a directory in this process.
    - `processes`: how many jobs run at a time; 0: one after the other in this process, which the first error ends.
    """
    jobs = list({job.digest: job for job in jobs}.values())
    results, problems = results_of(root, jobs), []
    left = estimate(jobs, results, processes)
    say(f"{len(jobs)} jobs, {len(results)} done before; about {duration(left)} with {max(1, processes)} at a time")
    begin = time.monotonic()
    waiting = [job for job in jobs if job.digest not in results]
    ended = _in_processes(waiting, set(results), Processes(root, prepare), processes)
    if processes == 0:
        ended = ((job, do(prepare(root, job)) and None) for job in waiting)
    for number, (job, problem) in enumerate(ended, 1):
        if problem is not None:
            problems.append(problem)
            say(problem)
            continue
        results |= results_of(root, [job])
        rate, left = 3600 * number / (time.monotonic() - begin), duration(estimate(jobs, results, processes))
        took = duration(results[job.digest]["seconds"])
        say(f"{len(results)} of {len(jobs)} jobs, {job.title}: {took}; {rate:.1f} jobs per hour, about {left} left")
    return problems


def _in_processes(jobs: list[Job], done: set[str], pool: Processes, number: int) -> Iterator[tuple[Job, str | None]]:
    """Runs the jobs, up to `number` at a time, and yields each with its problem when it has ended."""
    waiting, failed = list(jobs), set()
    try:
        while waiting or pool.running:
            ready = [job for job in waiting if done.issuperset(job.after)]
            for job in ready[: number - len(pool.running)]:
                pool.start(job)
                waiting.remove(job)
            time.sleep(LOOK_SECONDS)
            for job, problem in pool.ended():
                (done if problem is None else failed).add(job.digest)
                yield job, problem
            for job in [job for job in waiting if failed.intersection(job.after)]:
                failed.add(job.digest)
                waiting.remove(job)
    finally:
        pool.stop()
