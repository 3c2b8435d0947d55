"""`python -m flows.process.dvc_repro [STAGE] [--force]`: bring one stage of dvc.yaml, or all, up to date, by DVC's API.

Prints nothing of its own but errors: stages say themselves when they begin and end. Exit status: 0 where all is up to
date, BUSY where another DVC process holds what is needed, 1 for any other error.
"""

import argparse
import sys

BUSY = 73  # EX_CANTCREAT of sysexits.h


def main() -> int:
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo
    from dvc.stage.exceptions import StageCmdFailedError

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", nargs="?", help="a stage, or a foreach group; none: all stages")
    parser.add_argument("--force", action="store_true", help="run stages also where nothing has changed")
    arguments = parser.parse_args()
    try:
        Repo().reproduce(targets=arguments.stage, single_item=arguments.stage is not None, force=arguments.force)
    except DvcException as error:
        causes = list(chain(error))
        if any(isinstance(cause, LockError) for cause in causes):
            print(f"another DVC process holds what is needed: {causes[-1]}", file=sys.stderr)
            return BUSY
        if not any(
            isinstance(cause, StageCmdFailedError) for cause in causes
        ):  # the stage has said itself what is wrong
            print("error: " + ": ".join(str(cause) for cause in causes), file=sys.stderr)
        return 1
    return 0


def chain(error: BaseException | None):
    """An error and what caused it, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__


if __name__ == "__main__":
    sys.exit(main())
