"""A trial: the stage is started, something of it is killed, started again, and in the end compared bit for bit."""

import contextlib
import dataclasses
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.soak import workspace as spaces
from tests.soak.processes import environment, left_after, living, marked, stacks, start

GONE_SECONDS = 10.0  # within which nothing of a killed run may be left
LIMIT_SECONDS = 200.0  # for a run that nobody kills; below the time limit of a test, so that it can say what hangs
AGAIN, MOST_KILLS = 0.4, 3  # chance that the next start is killed too, and how often at most
STAGE = ("-m", "tasks", spaces.STAGE)
WORKER = "RayTrainWorker"


@dataclass(frozen=True)
class Kind:
    """What is killed, and how the run is started."""

    command: tuple[str, ...]
    signals: tuple[str, ...] = ("SIGKILL", "SIGTERM")
    workers: int = 0


KINDS = {
    "driver": Kind(STAGE),
    "dvc": Kind(("-m", "dvc", "repro", "--single-item", spaces.STAGE)),
    "flow": Kind(("-m", "tests.soak.flow")),
    "worker": Kind(STAGE, ("SIGKILL",), workers=2),  # one of Ray's workers, and not what was started
    "driver2": Kind(STAGE, workers=2),
    "dvc2": Kind(("-m", "dvc", "repro", "--single-item", spaces.STAGE), workers=2),
}


@dataclass(frozen=True)
class Kill:
    """A signal, and its moment: `seconds` after the start (of the workers), or after so many rows of metrics."""

    signal: str
    seconds: float = 0.0
    rows: int = 0


@dataclass(frozen=True)
class Trial:
    kind: str
    kills: tuple[Kill, ...]
    seed: int = 0  # which worker is killed


@dataclass
class Result:
    """What became of a trial; `moments` are those of the kills, in seconds and rows of metrics."""

    trial: Trial
    moments: list[tuple[float, int]] = field(default_factory=list)
    restarts: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    life: float = 0.0  # of the last run; of a worker: from when there were workers
    workspace: str | None = None  # kept where there is a problem

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def line(self) -> str:
        moments = " ".join(
            f"{kill.signal}@{seconds:.1f}s/{rows}"
            for kill, (seconds, rows) in zip(self.trial.kills, self.moments, strict=False)
        )
        verdict = "; ".join(self.problems) if self.problems else "equal"
        kills = f"{self.trial.kind:8} {moments or 'not killed':48} {self.restarts} restarts"
        return f"{kills} {self.seconds:6.1f} s  {verdict}"


def random_trial(kind: str, seed: int, seconds: float, rows: int) -> Trial:
    """Kills at random moments of a run of `seconds` (of a worker: from when there are workers) and `rows` steps.

    Half of them are spread evenly over the run's time, start-up and last writing included, and half over its steps,
    which with two workers are the smaller part of it.
    """
    rng = random.Random(f"{kind} {seed}")
    kills = []
    while not kills or (len(kills) < limit_of(kind) and rng.random() < AGAIN):
        number = rng.choice(KINDS[kind].signals)
        if rng.random() < 0.5:
            kills.append(Kill(number, round(rng.uniform(0, seconds), 2)))
        else:
            kills.append(Kill(number, round(rng.uniform(0, 0.3), 2), rng.randint(1, rows)))
    return Trial(kind, tuple(kills), seed)


def limit_of(kind: str) -> int:
    """Lost workers are limited by compute.retries, which is 2."""
    return 2 if kind == "worker" else MOST_KILLS


class Stage:
    """One workspace in which the stage is started, perhaps several times; every process carries `mark`."""

    def __init__(self, directory: Path, kind: str, mark: str, **variables: str):
        self.directory, self.kind, self.mark = directory, kind, mark
        # Ray's sockets lie in there, and the name of a socket is short.
        self.ray = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        self.variables = environment(mark, RAY_TMPDIR=self.ray.name, **variables)
        self.log = self.process = None
        self.starts, self.started, self.ended = 0, 0.0, 0.0

    def start(self) -> None:
        self.starts += 1
        self.log = self.directory / f"run-{self.starts}.log"
        self.process = start([sys.executable, *KINDS[self.kind].command], self.directory, self.log, self.variables)
        self.started = time.monotonic()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def reaches(self, kill: Kill) -> bool:
        """Wait for a kill's moment; False where there is nothing left to kill then."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while kill.rows and spaces.num_rows(self.directory) < kill.rows and time.monotonic() < deadline:
            if self.has_ended():
                return False
            time.sleep(0.02)
        if kill.seconds:
            begin = time.monotonic() if kill.rows else self.started
            if self.kind == "worker" and not kill.rows:
                begin = self.workers_since()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(max(0.0, begin + kill.seconds - time.monotonic()))
        return not self.has_ended() and (self.kind != "worker" or bool(living(self.mark, WORKER)))

    def workers_since(self) -> float:
        """Wait for all of Ray's workers; the moment at which they were there."""
        while len(living(self.mark, WORKER)) < KINDS[self.kind].workers and not self.has_ended():
            time.sleep(0.1)
        return time.monotonic()

    def kill(self, number: str, rng: random.Random | None = None) -> list[str]:
        """Send the signal to what this kind is about; what is wrong after it."""
        if self.kind == "worker":
            rng.choice(living(self.mark, WORKER)).send_signal(getattr(signal, number))
            return []
        self.process.send_signal(getattr(signal, number))
        return [f"left behind: {line}" for line in left_after(self.mark, GONE_SECONDS)]

    def finish(self) -> list[str]:
        """Wait for the end of a run that nobody kills; what is wrong with it."""
        try:
            status = self.process.wait(LIMIT_SECONDS)
            self.ended = time.monotonic()
        except subprocess.TimeoutExpired:
            where = stacks(self.mark, self.log, Path(self.ray.name))
            return [f"not ended after {LIMIT_SECONDS} s: {self.output()[-300:]}\n{where}"]
        problems = [] if status == 0 else [f"exit status {status}: {self.output()[-300:]}"]
        return problems + [f"left behind: {line}" for line in left_after(self.mark, GONE_SECONDS)]


def run_trial(prepared: spaces.Prepared, trial: Trial, name: str, storage: Path | None = None, **variables) -> Result:
    """Carry a trial out in a workspace of its own, which stays where something is wrong."""
    kind, result, begin = KINDS[trial.kind], Result(trial), time.monotonic()
    directory = spaces.copy(prepared, prepared.directory / name, kind.workers, storage)
    with marked() as mark:
        stage = Stage(directory, trial.kind, mark, **variables)
        kill_all(stage, trial, result)
        if not result.problems:
            begin_of_life = stage.workers_since() if trial.kind == "worker" else stage.started
            result.problems += stage.finish()
            result.life = stage.ended - begin_of_life
    if not result.problems:
        result.problems += spaces.differences(spaces.outcome(directory), prepared.references[kind.workers])
    result.seconds = time.monotonic() - begin
    if result.problems:
        result.workspace = str(directory)
    else:
        shutil.rmtree(directory)
    return result


def killed_once(prepared: spaces.Prepared, kind: str, kill: Kill, **variables: str) -> list[str]:
    """What was wrong with a trial of one kill, in a workspace of its name; also if it ended before."""
    result = run_trial(prepared, Trial(kind, (kill,)), kind, **variables)
    return result.problems + ([] if len(result.moments) == 1 else ["ended before it was killed"])


def kill_all(stage: Stage, trial: Trial, result: Result) -> None:
    """Start, kill, and start again what was killed; leaves a run that nobody kills any more."""
    rng = random.Random(trial.seed)
    stage.start()
    for kill in trial.kills:
        if not stage.reaches(kill):
            return
        result.moments.append((round(time.monotonic() - stage.started, 1), spaces.num_rows(stage.directory)))
        result.problems += stage.kill(kill.signal, rng)
        if result.problems:
            return
        if trial.kind != "worker":
            result.restarts += 1
            stage.start()
