"""Whether a stage must not resume from its checkpoints: `dvc repro --force`, `elastic run --force`.

DVC does not tell its stages that it was forced. So a stage reads the command line of the DVC that started it, with
DVC's own parser. In a queued experiment it reads the options that DVC has kept. A program that runs DVC by its API sets
the variable instead.
"""

import contextlib
import os

import psutil

from tasks.runs.dvc import is_forced, is_queued_with_force

VARIABLE = "ELASTIC_FROM_THE_START"


def is_wanted() -> bool:
    """Whether this stage was forced. Raises UserError if a queued experiment does not say whether it was."""
    if os.environ.get(VARIABLE):
        return True
    if "DVC_STAGE" not in os.environ:  # set by DVC for its stages
        return False
    commands = []
    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):  # of another user
            commands.append(process.cmdline())
    arguments = list(filter(None, map(dvc_arguments, commands)))
    if any(given[:2] == ["exp", "exec-run"] for given in arguments):
        return is_queued_with_force()
    # DVC's parser is slow to import, so it is asked only where some option may be this one.
    return any(any(word.startswith("-") and "f" in word for word in given) and is_forced(given) for given in arguments)


def dvc_arguments(command: list[str]) -> list[str]:
    """The arguments of a command line of DVC: what follows `dvc` or `python -m dvc`. Empty for any other command."""
    for place, word in enumerate(command[:3]):
        if os.path.basename(word) == "dvc":
            return command[place + 1 :]
    return []
