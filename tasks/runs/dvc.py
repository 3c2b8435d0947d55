"""What a stage asks of DVC, by its Python API."""

import contextlib
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
