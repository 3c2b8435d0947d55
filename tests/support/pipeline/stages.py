"""Stages run in this process as `python -m tasks STAGE` runs them: an error ends with a text and an exit status."""

import importlib

from tasks.runtime.exit_status import errors_as_text


def run_stage(name: str, *arguments: str) -> None:
    """Run a stage in the working directory. Raises SystemExit as the process would end."""
    with errors_as_text():
        importlib.import_module(f"tasks.{name}").main(*arguments)


def check_parameters(*arguments: str) -> None:
    """`python -m tasks.commands.check`, in this process."""
    from tasks.commands import check

    with errors_as_text():
        check.main(arguments)
