"""The job of a stage that takes long: its key, the places of its files, and what an earlier run has left there."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from elastic_core.errors import UserError
from elastic_core.io import storage
from elastic_core.io.atomic import write_text
from elastic_core.io.directory_transfer import is_same, move
from elastic_core.io.filesystem import why_impossible
from elastic_core.io.json_files import ADVICE, read_json
from tasks.runs import from_the_start, lock, provenance
from tasks.runs.key import Inputs, read_inputs
from tasks.runs.unchanged import check_key
from tasks.settings.schema import Params

# Files that only this machine needs: metrics and progress of unfinished runs.
LOCAL = Path("checkpoints")
RUN = "run.json"  # what a run is, in its directory
SHAPE = {
    **{"checkpoints": str, "stage": str, "key": str, "started": str},
    **{"parameters": dict, "libraries": dict, "files": dict, "continues?": {"run": str}},
    "moves_from?": {"run": str, "checkpoints": str},
}
MOVES = "moves_from"  # in RUN while files move to the run's places: whose they are, and where the checkpoints were
# Checkpoints of training, sums of `rank`, and states of `evaluate`. Other files belong to the run's local directory.
CHECKPOINTS = ("step-*", "*.state", "states")
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
    ELASTIC_CONTINUE names it. Raises ConfigError if another process holds the run, and UserError if the inputs are not
    those with which this process began.
    """
    inputs = read_inputs(name)
    check_key(inputs)
    job = Job(name, inputs.key)
    location = str(job.directory) if settings is None else job.checkpoints(settings)
    if not is_first_process():
        yield job
        return
    with lock.only_one(location, name):
        if from_the_start.is_wanted():
            _remove_other_places(job, location)
            remove_files(location)
            remove_files(str(job.directory))
        elif (old := os.environ.get(CONTINUE, "")).startswith(f"{name}-"):
            _take_over(old, job, inputs, location)
        yield dataclasses.replace(job, record=_begin(job, inputs, location))


def is_first_process() -> bool:
    """Whether this is the only process of a stage, or the first one of torchrun's, which acts for all of them."""
    return os.environ.get("RANK", "0") == "0"


def _begin(job: Job, inputs: Inputs, location: str) -> dict:
    """Write down what the run is, if it has not begun before; the run's provenance so far.

    A move of its files that was interrupted is finished. If its checkpoints are at another place, they move here.
    """
    record = read_run(job.directory)
    if record is None:
        record = {"checkpoints": location, **provenance.begin(job.name, job.key, inputs)}
        _write_run(job.directory, record)
    elif not is_same(record["checkpoints"], location):
        record = _move_here(job, record, location)
    else:
        record = _finish_move(job.directory, record, location)
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
    with _held(record["checkpoints"], job.name):
        _finish_move(LOCAL / old, record, location)
        remove_files(location)
        content = {**provenance.begin(job.name, job.key, inputs), "started": record["started"]}
        content |= {"checkpoints": location, "continues": {"run": old, "changed": changed}}
        _move_files(job.directory, {**content, MOVES: {"run": old, "checkpoints": record["checkpoints"]}})
    print(f"{job.name}: goes on from {old}, though this has changed: {'; '.join(changed) or 'nothing'}")


def _move_here(job: Job, record: dict, location: str) -> dict:
    """Move a run's checkpoints to `location`, because `compute.storage` has changed; what the run is now.

    Raises ConfigError if another process holds the run at its old place.
    """
    old = record["checkpoints"]
    try:
        with _held(old, job.name):
            record = _finish_move(job.directory, record, location)
            for name in _list_checkpoints(location, job.directory):  # of a run that is not on record
                storage.remove(storage.join(location, name))
            found = _list_checkpoints(old, job.directory)
            mark = {"run": job.directory.name, "checkpoints": old}
            record = _move_files(job.directory, {**record, "checkpoints": location, MOVES: mark})
    except storage.StorageUnavailable:
        raise
    except storage.StorageError as error:
        advice = f"set compute.storage as it was, or remove {job.directory}, and the run starts anew"
        raise UserError(
            f"{job.name}: its checkpoints cannot move from {old} to {location}: {error}; {advice}"
        ) from None
    what = "its checkpoints moved" if found else "no checkpoints were there to move"
    print(f"{job.name}: compute.storage has changed; {what} from {old} to {location}")
    return record


def _finish_move(directory: Path, record: dict, mine: str) -> dict:
    """Finish a move of a run's files, if one was interrupted; what the run is now.

    This process holds the place `mine` already.
    """
    if MOVES not in record:
        return record
    place = record[MOVES]["checkpoints"]
    with contextlib.nullcontext() if is_same(place, mine) else _held(place, record["stage"]):
        record = _move_files(directory, record)
    print(f"{record['stage']}: an interrupted move of its files from {place} to {record['checkpoints']} is finished")
    return record


def _move_files(directory: Path, record: dict) -> dict:
    """Move the files of a run to its places, from those that `record[MOVES]` names; what the run is now.

    If this is interrupted, the next start does it again. So `record` is written first, and without the mark last.
    """
    _write_run(directory, record)
    place, source = record[MOVES]["checkpoints"], LOCAL / record[MOVES]["run"]
    for name in _list_checkpoints(place, source):
        move(storage.join(place, name), storage.join(record["checkpoints"], name))
    if source != directory:
        for path in sorted(source.glob("*")):
            if path.name != RUN and not lock.is_lease(path.name):
                move(str(path), str(directory / path.name))
        remove_files(str(source))
        remove_empty(str(source))
    record = {name: value for name, value in record.items() if name != MOVES}
    _write_run(directory, record)
    return record


def _list_checkpoints(place: str, directory: Path) -> list[str]:
    """The names of a run's checkpoints at a place, which may be its local directory and hold its other files too."""
    names = [name for name in storage.list_names(place) if not lock.is_lease(name)]
    if not is_same(place, str(directory)):
        return names
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in CHECKPOINTS)]


@contextlib.contextmanager
def _held(location: str, what: str) -> Iterator[None]:
    """Hold a place whose files move away. In the end, directories without a file are removed."""
    with lock.only_one(location, what):
        yield
    remove_empty(location)


def _write_run(directory: Path, record: dict) -> None:
    write_text(directory / RUN, json.dumps(record, indent=1) + "\n")


def remove_empty(location: str) -> None:
    """Remove a local directory if it is empty. At a URL there are only files."""
    if not storage.is_url(location):
        with contextlib.suppress(OSError):
            os.rmdir(location)


def _remove_other_places(job: Job, location: str) -> None:
    """Remove the checkpoints that the run has where `compute.storage` was before."""
    try:
        record = read_run(job.directory)
    except UserError:  # a damaged file is removed with the others
        return
    for place in [] if record is None else places_of(record, job.directory):
        try:
            if not is_same(place, location):
                with _held(place, job.name):
                    remove_files(place)
        except storage.StorageError as error:
            print(f"{job.name}: its old checkpoints at {place} are kept, because they cannot be removed now: {error}")


def places_of(record: dict, directory: Path) -> list[str]:
    """The places of a run's checkpoints: where they are, and where they come from if they move at the moment."""
    mark = record.get(MOVES, {})
    return [record["checkpoints"], *([mark["checkpoints"]] if mark.get("run") == directory.name else [])]


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
        if (mark := record.get(MOVES)) is not None:
            if Path(mark["run"]).name != mark["run"] or not mark["run"].startswith(f"{record['stage']}-"):
                raise UserError(f"{path}: {MOVES}.run={mark['run']!r}; allowed: a run of this stage; {ADVICE}")
            _check_place(mark["checkpoints"], directory.with_name(mark["run"]))
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
