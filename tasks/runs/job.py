"""The job of a stage that takes long: its key, the places of its files, and what an earlier run has left there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from elastic_core.errors import UserError
from elastic_core.io import storage
from elastic_core.io.atomic import write_text
from elastic_core.io.filesystem import why_impossible
from elastic_core.io.json_files import ADVICE, read_json
from tasks.runs import from_the_start, lock, provenance
from tasks.runs.key import Inputs, read_inputs
from tasks.settings.schema import Params

# Files that only this machine needs: metrics and progress of unfinished runs.
LOCAL = Path("checkpoints")
RUN = "run.json"  # what a run is, in its directory
SHAPE = {
    **{"checkpoints": str, "stage": str, "key": str, "started": str},
    **{"parameters": dict, "libraries": dict, "files": dict, "continues?": {"run": str}},
}
CONTINUE = "ELASTIC_CONTINUE"  # names an old run that a stage goes on from, though its code or inputs have changed


@dataclass(frozen=True)
class Job:
    """One run of a stage.

    `key` is a digest of everything that decides the result (key.py). A stage that is started again with the same
    key resumes its run; any change gives another key, and so a new run. `record` is the run's provenance so far.
    `shown_by_launcher`: the process that launches the workers shows their progress.
    """

    name: str
    key: str
    record: dict = field(default_factory=dict)
    shown_by_launcher: bool = False

    @property
    def directory(self) -> Path:
        """The directory of the run's metrics and progress, on this machine."""
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
        return storage.join(settings.compute.storage, self.directory.name)


@contextlib.contextmanager
def started(name: str, settings: Params | None = None) -> Iterator[Job]:
    """The job of the stage `name`, held by this process for the length of the block.

    With `settings`, the run has checkpoints in `settings.compute.storage`. The checkpoints of an earlier run with the
    same key stay, unless the stage was forced (from_the_start.py). An old run with another key is taken over where
    ELASTIC_CONTINUE names it. Raises ConfigError if another process holds the run.
    """
    inputs = read_inputs(name)
    job = Job(name, inputs.key)
    location = str(job.directory) if settings is None else job.checkpoints(settings)
    if not is_first_process():
        yield job
        return
    with lock.only_one(location, name):
        if from_the_start.is_wanted():
            remove_files(location)
            remove_files(str(job.directory))
        elif (old := os.environ.get(CONTINUE, "")).startswith(f"{name}-"):
            _take_over(old, job, inputs, location)
        yield dataclasses.replace(job, record=_begin(job, inputs, location))


def is_first_process() -> bool:
    """Whether this is the only process of a stage, or the first one of torchrun's, which acts for all of them."""
    return os.environ.get("RANK", "0") == "0"


def _begin(job: Job, inputs: Inputs, location: str) -> dict:
    """Write down what the run is, if it has not begun before; the run's provenance so far."""
    path = job.directory / RUN
    if not path.is_file():
        content = {"checkpoints": location, **provenance.begin(job.name, job.key, inputs)}
        write_text(path, json.dumps(content, indent=1) + "\n")
    record = read_run(job.directory)
    return {name: value for name, value in record.items() if name != "checkpoints"}


def _take_over(old: str, job: Job, inputs: Inputs, location: str) -> None:
    """Move the files of the run `old` to this job's places, and write down what has changed since that run began.

    Does nothing if this job has begun before. Raises UserError if there is no such run, and ConfigError if another
    process holds it.
    """
    if (job.directory / RUN).is_file() or old == job.directory.name:
        return
    record = read_run(LOCAL / old)
    if record is None:
        names = names_of_runs(stage=job.name)
        raise UserError(f"{CONTINUE}: got {old!r}; allowed: a run of this stage that has not ended ({names})")
    changed = Inputs(record["parameters"], record["libraries"], record["files"]).differences(inputs)
    with lock.only_one(record["checkpoints"], job.name):
        remove_files(location)
        for source, target in {record["checkpoints"]: location, str(LOCAL / old): str(job.directory)}.items():
            for name in storage.list_names(source):
                if name != RUN and not name.startswith(lock.PREFIX):
                    storage.move(storage.join(source, name), storage.join(target, name))
        content = {**provenance.begin(job.name, job.key, inputs), "started": record["started"]}
        content |= {"checkpoints": location, "continues": {"run": old, "changed": changed}}
        write_text(job.directory / RUN, json.dumps(content, indent=1) + "\n")
    shutil.rmtree(LOCAL / old)
    print(f"{job.name}: goes on from {old}, though this has changed: {'; '.join(changed) or 'nothing'}")


def names_of_runs(workspace: Path = Path(), stage: str | None = None) -> str:
    """The names of the runs that have left files in a workspace (stage None: of all), for error messages."""
    pattern = "*" if stage is None else f"{stage}-*"
    return ", ".join(sorted(path.parent.name for path in (workspace / LOCAL).glob(f"{pattern}/{RUN}"))) or "none"


def read_run(directory: Path) -> dict | None:
    """What the run of a directory is; None if the directory holds no run. Raises UserError for a damaged file."""
    path = directory / RUN
    if not path.is_file():
        return None
    try:
        record = read_json(path, shape=SHAPE)
        _check_place(record["checkpoints"], directory)
        return record
    except UserError as error:
        raise UserError(f"{error}; or remove {directory}, and the run starts anew") from None


def _check_place(checkpoints: str, directory: Path) -> None:
    """Raise UserError unless a run in `directory` can have its checkpoints there: all files in it may be removed."""
    problem = None if storage.is_url(checkpoints) else why_impossible(directory.parents[1] / checkpoints)
    if problem is not None or not checkpoints.endswith(f"/{directory.name}"):
        problem = problem or f"allowed: a directory or URL that ends in /{directory.name}"
        raise UserError(f"{directory / RUN}: checkpoints={checkpoints!r}; {problem}; {ADVICE}")


def remove_files(location: str) -> None:
    """Remove all files of a run but its lock."""
    for name in storage.list_names(location):
        if not name.startswith(lock.PREFIX):
            storage.remove(storage.join(location, name))
