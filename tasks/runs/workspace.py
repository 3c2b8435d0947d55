"""A run has its workspace for itself: another run would rewrite code and parameters between two of its stages."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from tasks.runs import lock
from tasks.settings import profiles

LEASE = Path(".dvc") / "tmp" / "run"  # in a workspace: the lease of the run that works there
BUSY_SECONDS = 5.0  # between two looks at a workspace that is in use
Result = TypeVar("Result")


@contextlib.contextmanager
def prepared(
    profile: str,
    root: Path,
    budgets: Mapping[str, float | str] | None,
    overrides: Iterable[str],
    log: Callable[[str], None],
) -> Iterator[Path]:
    """The workspace of a run, up to date with the checkout, and held for the length of the block.

    As long as another run holds it, or a DVC process works in it, this one waits and says so once. The checkout itself,
    where the profile `default` runs, is not rewritten, so it is not held: its stages wait for each other one by one.
    Raises UserError as `profiles.prepare_workspace` does.
    """
    overrides = list(overrides)
    workspace = profiles.workspace_of(profile, root, budgets, overrides)
    if workspace == root:
        yield root
        return

    def take(say: Callable[[str], None]) -> lock.Lease:
        return lock.take(workspace / LEASE, lambda holder: say(f"{workspace} is held by {holder}"))

    lease = when_free(take, log)

    def end(reason: str) -> None:
        if lease.is_stored():  # this process was stopped for a while, as by Ctrl-Z, and nobody has noticed
            return
        print(f"error: {workspace}: {reason}; this process ends", file=sys.stderr, flush=True)
        os._exit(os.EX_TEMPFAIL)

    with lock.kept(lease, end):
        yield when_free(lambda _: profiles.prepare_workspace(profile, root, budgets, overrides), log)


def when_free(attempt: Callable[[Callable[[str], None]], Result], log: Callable[[str], None]) -> Result:
    """What `attempt` returns, which is called again and again as long as a workspace is in use.

    It is given a function that says why it waits. What is said for the first time is logged.
    """
    waiting = False

    def say(reason: str) -> None:
        nonlocal waiting
        if not waiting:
            log(f"{reason}\nWaiting until it is free …")
        waiting = True

    while True:
        try:
            return attempt(say)
        except (lock.Held, profiles.InUse) as error:
            say(str(error))
            time.sleep(BUSY_SECONDS)


def holder_of(workspace: Path) -> str | None:
    """The process that works in a workspace: a run, or DVC. None if there is none."""
    return lock.holder_of(workspace / LEASE) or profiles.dvc_process(workspace)
