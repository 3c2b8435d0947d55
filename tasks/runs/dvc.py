"""What a stage asks of DVC, by its Python API."""

import contextlib
import pickle
import subprocess
from collections.abc import Iterator, Sequence

from elastic_core.errors import UserError


@contextlib.contextmanager
def dvc_stage(name: str) -> Iterator:
    """DVC's object for one stage of the working directory's dvc.yaml, such as ``extract@small``.

    Raises UserError if DVC cannot read it.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            yield repo.stage.load_one(name=name)
    except DvcException as error:
        raise UserError(f"stage {name}: DVC cannot read it from dvc.yaml: {error}") from None


def is_forced(arguments: Sequence[str]) -> bool:
    """Whether the arguments of a `dvc` command have its option --force, also as -f and among other short options."""
    from dvc.cli import DvcParserError
    from dvc.cli.parser import get_main_parser

    try:
        return bool(getattr(get_main_parser().parse_args(arguments), "force", False))
    except (DvcParserError, SystemExit):  # not a command of DVC
        return False


def is_queued_with_force() -> bool:
    """Whether the queued experiment in whose copy of the checkout this process works was queued with --force.

    DVC keeps the options of `dvc exp run --queue` in the commit of the experiment, and reads them when it runs it.
    Raises UserError if they cannot be read.
    """
    from dvc.repo.experiments.executor.base import BaseExecutor
    from dvc.repo.experiments.refs import EXEC_MERGE

    options = f"{EXEC_MERGE}:./.dvc/tmp/{BaseExecutor.PACKED_ARGS_FILE}"
    done = subprocess.run(["git", "show", options], capture_output=True)
    try:
        return bool(pickle.loads(done.stdout)["kwargs"].get("force"))
    except (pickle.UnpicklingError, EOFError, LookupError, AttributeError, ImportError):
        reason = done.stderr.decode(errors="replace").strip() or "they are not what DVC writes"
        raise UserError(
            "this experiment was queued, and DVC's options for it cannot be read, so it is not known whether it was "
            f"queued with --force; run it with `dvc exp run --temp` instead ({options}: {reason})"
        ) from None
