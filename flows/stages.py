"""The stages of dvc.yaml, and how DVC brings one up to date: what the flow and `elastic run` have in common."""

import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flows.output import follow

BUSY_SECONDS = 5.0  # between looks at a stage that another DVC process holds
_BUSY = re.compile(r"^ERROR: .*(is busy, it is being blocked by|Unable to acquire lock)")
_STATUS = re.compile(r"exited with (\d+)$")


class StageFailed(RuntimeError):
    """A stage ended with an error; the message carries its last lines."""


class StageInterrupted(StageFailed):
    """A stage ended for a reason that another try may mend: a server was away, a worker was lost."""


class StageBusy(StageFailed):
    """Another DVC process holds the lock of this stage."""


def stage_names(workspace: Path) -> list[str]:
    """The stages, foreach groups counted as one, in the order of dvc.yaml."""
    from ruamel.yaml import YAML

    return list(YAML(typ="safe").load(workspace / "dvc.yaml")["stages"])


def select(names: Sequence[str], first: str | None, last: str | None, only: Sequence[str] = ()) -> list[str]:
    """The stages of `names` from `first` until `last`, of these only those in `only` where it names any.

    Raises ValueError for a stage that does not exist and for a selection without any.
    """
    for name in filter(None, (first, last, *only)):
        if name not in names:
            raise ValueError(f"stage: got {name!r}; allowed: {', '.join(names)} (dvc.yaml)")
    start = names.index(first) if first else 0
    end = names.index(last) + 1 if last else len(names)
    chosen = [name for name in names[start:end] if not only or name in only]
    if not chosen:
        raise ValueError(
            f"stages: nothing is left from {first or names[0]} until {last or names[-1]}"
            + (f" of only {', '.join(only)}" if only else "")
            + f"; their order is {', '.join(names)}"
        )
    return chosen


def reproduce(stage: str, workspace: Path, force: bool, log: Callable[[str], None]) -> list[str]:
    """Bring one stage of dvc.yaml, or every item of a foreach group, up to date; the names of those that ran.

    `log` is given each line of output. As long as another DVC process holds the stage, this one waits for it. Raises
    StageInterrupted where another try may help, StageFailed otherwise.
    """
    waiting = False
    while True:
        try:
            return _reproduce(stage, workspace, force, log if not waiting else _without_errors(log))
        except StageBusy as busy:
            if not waiting:
                log(f"{busy}\nWaiting until it is free …")
            waiting = True
            time.sleep(BUSY_SECONDS)


def _reproduce(stage: str, workspace: Path, force: bool, log: Callable[[str], None]) -> list[str]:
    ran = []

    def take(line: str) -> None:
        log(line)
        if line.startswith("Running stage "):
            ran.append(line.split("'")[1])

    command = [sys.executable, "-m", "dvc", "repro", "--single-item", *(["--force"] if force else []), stage]
    status, lines = follow(command, workspace, take)
    if status == 0:
        return ran
    if any(_BUSY.match(line) for line in lines):
        raise StageBusy(f"another DVC process works on what stage {stage!r} needs, see above")
    statuses = [found[1] for found in map(_STATUS.search, lines) if found]
    kind = StageInterrupted if str(os.EX_TEMPFAIL) in statuses else StageFailed
    raise kind(
        f"stage {stage!r} ended with exit status {statuses[-1] if statuses else status} in {workspace}; its last "
        "lines:\n" + "\n".join(lines)
    )


def _without_errors(log: Callable[[str], None]) -> Callable[[str], None]:
    """Of further looks at a busy stage only what is new is shown: that it is busy has been said."""
    return lambda line: None if _BUSY.match(line) or line.startswith(("  (PID", "To ")) else log(line)
