"""The stages of dvc.yaml, and how DVC brings one up to date: what the flow and `elastic run` have in common."""

import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flows.process.output import follow
from flows.process.terminal import draw

BUSY_SECONDS = 5.0  # between looks at a stage that another DVC process holds
_BUSY = re.compile(r"^ERROR: .*(is busy, it is being blocked by|Unable to acquire lock)")
_BEGIN = "Running stage "
_LAST_LINES = "; its last lines:\n"
_STATUS = re.compile(r"exited with (\d+)$")


class StageFailed(RuntimeError):
    """A stage ended with an error; the message carries its last lines."""

    @property
    def summary(self) -> str:
        """The message without those lines, for whoever has seen them."""
        return str(self).partition(_LAST_LINES)[0]


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


def reproduce(
    stage: str | None, workspace: Path, force: bool, log: Callable[[str], None], terminal: bool = False
) -> list[str]:
    """Bring one stage of dvc.yaml, or every item of a foreach group, up to date (None: all); the names that ran.

    `log` is given each line of output, or, with `terminal`, only what is said here: the output is drawn on this
    process's terminal. As long as another DVC process holds the stage, this one waits for it. Raises StageInterrupted
    where another try may help, StageFailed otherwise.
    """
    ran, waiting = [], False
    while True:
        try:
            _reproduce(stage, workspace, force, log, terminal, waiting, ran)
            return ran
        except StageBusy as busy:
            if not waiting:
                log(f"{busy}\nWaiting until it is free …")
            waiting = True
            time.sleep(BUSY_SECONDS)


def _reproduce(stage: str | None, workspace: Path, force: bool, log, terminal: bool, waiting: bool, ran: list) -> None:
    """One try; names of stages that run go to `ran`. `waiting`: that the stage is busy has been said."""

    before = len(ran)

    def take(line: str) -> None:
        if not terminal and not (waiting and _is_known(line)):
            log(line)
        if line.startswith(_BEGIN):
            ran.append(line.split("'")[1])

    which = ["--single-item", stage] if stage else []
    command = [sys.executable, "-m", "dvc", "repro", *(["--force"] if force else []), *which]
    if terminal:
        status, lines = draw(command, workspace, take, _BEGIN if waiting else None)
    else:
        status, lines = follow(command, workspace, take)
    busy = status != 0 and any(_BUSY.match(line) for line in lines)
    if terminal and waiting and not busy and len(ran) == before:  # what it has drawn was held back to the end
        log("\n".join(lines))
    if status == 0:
        return
    name = f"stage {stage!r}" if stage else "`dvc repro`"
    if busy:
        raise StageBusy(f"another DVC process works on what {name} needs, see above")
    if not stage and ran:
        name = f"stage {ran[-1]!r}"
    statuses = [found[1] for found in map(_STATUS.search, lines) if found]
    kind = StageInterrupted if str(os.EX_TEMPFAIL) in statuses else StageFailed
    ended = f"{name} ended with exit status {statuses[-1] if statuses else status} in {workspace}"
    raise kind(ended + _LAST_LINES + "\n".join(lines))


def _is_known(line: str) -> bool:
    """Whether an earlier look at a busy stage has said this already: that it is busy, and what has not changed."""
    return bool(_BUSY.match(line)) or line.startswith(("  (PID", "To ")) or line.endswith("didn't change, skipping")
