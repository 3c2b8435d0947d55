"""`elastic clean`: what runs have left on the disk and in storage, and removing it."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from elastic_core.errors import UserError
from tasks.runs import lock
from tasks.runs.job import LOCAL, RUN, remove_empty, remove_files
from tasks.runs.old_runs import OldRun, find_runs, lease_to_remove
from tasks.runs.workspace import holder_of

WORKSPACES = Path(".runs")


@dataclass(frozen=True)
class Left:
    """Something that runs have left. `kind`: "run" (unfinished, or not yet in DVC's cache), "files" or "workspace".

    - `name`: how the command names it.
    - `holder`: the process that works on it, or None.
    """

    kind: str
    name: str
    directory: Path
    num_bytes: int
    last_used: datetime.datetime
    holder: str | None = None
    run: OldRun | None = None

    def remove(self) -> None:
        """Remove it. Raises UserError if a process works on it."""
        runs = [self.run] if self.run is not None else find_runs(self.directory)  # their checkpoints may be on S3
        try:
            self._check_free(runs)  # before the first of them is removed
            for run in runs:
                run.remove()
            if self.kind == "workspace":
                self._check_free([])
                shutil.rmtree(self.directory, ignore_errors=True)
            elif self.kind == "files":
                with lease_to_remove(str(self.directory), self.name):
                    remove_files(str(self.directory))
                remove_empty(str(self.directory))
        except lock.Held as error:
            raise UserError(f"{self.name}: {error.holder} works on it; stop it first") from None

    def _check_free(self, runs: Iterable[OldRun]) -> None:
        """Raise lock.Held if a process works on it now: one may have begun since it was found."""
        holders = [*(run.holder for run in runs), holder_of(self.directory)]
        if holder := next(filter(None, holders), None):
            raise lock.Held(str(self.directory), holder)


def find_left(root: Path) -> list[Left]:
    """What runs in a checkout and in its workspaces have left, the largest first.

    A workspace also counts with its runs: removing it removes their files in it.
    """
    workspaces = sorted(path for path in (root / WORKSPACES).glob("*") if path.is_dir())
    found = [_workspace(path, root) for path in workspaces]
    for workspace in (root, *workspaces):
        found += _runs(workspace, root)
    return sorted(found, key=lambda left: -left.num_bytes)


def select(found: Iterable[Left], names: Iterable[str]) -> list[Left]:
    """Those of `found` with these names. Raises UserError for an unknown name."""
    by_name = {left.name: left for left in found}
    for name in names:
        if name not in by_name:
            raise UserError(f"elastic clean: got {name!r}; allowed: {', '.join(sorted(by_name)) or 'nothing is left'}")
    return [by_name[name] for name in names]


def _workspace(directory: Path, root: Path) -> Left:
    holders = [run.holder for run in find_runs(directory)]
    holder = next(filter(None, [*holders, holder_of(directory)]), None)
    return Left("workspace", str(directory.relative_to(root)), directory, *_size(directory), holder)


def _runs(workspace: Path, root: Path) -> list[Left]:
    """The runs of a workspace, and directories of runs that do not say what they are (of older versions)."""
    found = [
        Left(
            "run",
            str(run.directory.relative_to(root)),
            run.directory,
            run.num_bytes,
            datetime.datetime.fromtimestamp(run.last_used),
            run.holder,
            run,
        )
        for run in find_runs(workspace)
    ]
    others = [path for path in sorted((workspace / LOCAL).glob("*")) if path.is_dir() and not (path / RUN).is_file()]
    return found + [Left("files", str(path.relative_to(root)), path, *_size(path)) for path in others]


def _size(directory: Path) -> tuple[int, datetime.datetime]:
    """The size of a directory's files in bytes, and when the last of them changed."""
    states = [path.stat() for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    changed = max((state.st_mtime for state in states), default=directory.stat().st_mtime)
    return sum(state.st_size for state in states), datetime.datetime.fromtimestamp(changed)
