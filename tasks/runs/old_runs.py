"""Runs of stages whose checkpoints are still there: which they are, and which of them nobody needs any more.

A run's checkpoints are needed until DVC has the stage's outputs. After that they would only take space, and a stage
that is forced would resume from them and train nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elastic_core.io import storage
from tasks.runs import lock
from tasks.runs.job import LOCAL, RUN, places_of, read_run, remove_empty, remove_files
from tasks.runs.key import committed_inputs


@dataclass(frozen=True)
class OldRun:
    """A run that has left files. `places`: the directories or URLs of its checkpoints, besides `directory`.

    There are two places while the checkpoints move, or if a move was interrupted.
    """

    stage: str
    key: str
    directory: Path
    places: tuple[str, ...]
    parameters: dict

    @property
    def last_used(self) -> float:
        """When it last wrote to its directory on this machine, in seconds since 1970."""
        return max(path.stat().st_mtime for path in [self.directory, *self.directory.rglob("*")])

    @property
    def num_bytes(self) -> int:
        """The size of all its files."""
        return sum(storage.num_bytes(place) for place in {str(self.directory), *self.places})

    @property
    def holder(self) -> str | None:
        """Which process works on it."""
        return next(filter(None, map(lock.holder_of, self.places)), None)

    def remove(self) -> None:
        """Remove its files. Raises lock.Held if a process works on it, also one that has begun since it was found."""
        if self.holder is not None:
            raise lock.Held(self.places[0], self.holder)
        with contextlib.ExitStack() as leases:
            for place in self.places:
                leases.enter_context(lease_to_remove(place, f"{self.directory}"))
            record = read_run(self.directory)
            if record is None:  # another process has removed it
                return
            if _places(record, self.directory) != self.places:
                raise lock.Held(self.places[0], "a process that has moved its checkpoints")
            for place in (*self.places, str(self.directory)):
                remove_files(place)
        for place in (*self.places, str(self.directory)):
            remove_empty(place)


@contextlib.contextmanager
def lease_to_remove(place: str, what: str) -> Iterator[None]:
    """Hold a place whose files are removed, unless its disk is full: it has no space for a lease, of any process.

    Raises lock.Held if another process holds it.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.held(place, what))
        except storage.StorageError:
            if storage.is_url(place):
                raise
        yield


def find_runs(workspace: Path = Path()) -> list[OldRun]:
    """The runs that were started in a workspace and have left files."""
    found = []
    for path in sorted((workspace / LOCAL).glob(f"*/{RUN}")):
        record = read_run(path.parent)
        places = _places(record, path.parent)
        found.append(OldRun(record["stage"], record["key"], path.parent, places, record["parameters"]))
    return found


def _places(record: dict, directory: Path) -> tuple[str, ...]:
    """The places of a run's checkpoints, as seen from here: a run's record has them relative to its workspace."""
    workspace = directory.parents[1]
    return tuple(place if storage.is_url(place) else str(workspace / place) for place in places_of(record, directory))


def remove_finished() -> list[OldRun]:
    """Remove the runs in the working directory whose outputs DVC has, and the runs that these have superseded.

    A superseded run is an older one of the same stage with the same parameters, under older code or inputs. A run with
    other parameters is kept, one that went on after the finished one too, and one that a process works on. If storage
    cannot be reached, runs are kept, and a line says so.
    """
    by_stage: dict[str, dict[str, tuple[OldRun, float]]] = {}
    for run in find_runs():
        by_stage.setdefault(run.stage, {})[run.key] = run, run.last_used
    removed = []
    for stage, runs in by_stage.items():
        committed = committed_inputs(stage)
        if committed is None or committed.key not in runs:
            continue
        finished, finished_at = runs[committed.key]
        for run, used in runs.values():
            if used > finished_at or run.parameters != finished.parameters:
                continue
            try:
                run.remove()
                removed.append(run)
                if run is not finished:
                    print(f"{run.directory}: removed, because a newer run of {stage} has finished", flush=True)
            except lock.Held:
                continue
            except storage.StorageError as error:
                print(f"{run.directory}: is kept, because its checkpoints cannot be removed now: {error}", flush=True)
    return removed
