"""`python -m flows.process.dvc_repro [STAGE] [--force] [--events FILE]`: bring stages of dvc.yaml up to date.

It uses DVC's API, in a process of its own. It prints errors only: stages say themselves when they begin and end. At the
end it adds the names of the stages that ran to FILE, as a JSON line (see tasks/progress/events.py). Exit status: 0
where all is up to date, BUSY where another DVC process holds a stage or a file that is needed, 1 for any other error.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tasks.runs import from_the_start

BUSY = 73  # EX_CANTCREAT of sysexits.h


def main() -> int:
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo
    from dvc.stage.exceptions import StageCmdFailedError

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", nargs="?", help="a stage, or a foreach group; default: all stages")
    parser.add_argument("--force", action="store_true", help="run stages from the start, also if nothing has changed")
    parser.add_argument("--events", type=Path, help="the file that is told what ran")
    arguments = parser.parse_args()
    logging.getLogger("dvc").setLevel(logging.WARNING)
    logging.getLogger("dvc.output").setLevel(logging.ERROR)  # it warns of empty files: an imported parent's metrics
    if arguments.force:
        os.environ[from_the_start.VARIABLE] = "1"
    single = arguments.stage is not None
    try:
        ran = Repo().reproduce(targets=arguments.stage, single_item=single, force=arguments.force)
    except DvcException as error:
        causes = list(with_causes(error))
        if any(isinstance(cause, LockError) for cause in causes):
            print(f"another DVC process is at work: {causes[-1]}", file=sys.stderr)
            return BUSY
        if not any(isinstance(cause, StageCmdFailedError) for cause in causes):  # a stage says itself what is wrong
            print("error: " + ": ".join(str(cause) for cause in causes), file=sys.stderr)
        return 1
    if arguments.events is not None:
        with open(arguments.events, "a") as file:
            file.write(json.dumps({"event": "reproduced", "stages": [stage.addressing for stage in ran]}) + "\n")
    return 0


def with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause, the cause of that, …"""
    while error is not None:
        yield error
        error = error.__cause__


if __name__ == "__main__":
    sys.exit(main())
