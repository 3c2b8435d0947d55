"""The inputs of a stage must stay as they are while it runs.

DVC notes the state of inputs when a stage has ended. If one of them has changed by then, DVC would record the results
of the old state as results of the new one, and find the stage up to date ever after.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from elastic_core.errors import UserError
from tasks.runs.key import Inputs, read_inputs

KEY = "ELASTIC_KEY_AT_START"  # of the inputs when the process of a stage began


@contextlib.contextmanager
def inputs_unchanged(name: str | None) -> Iterator[None]:
    """Raise UserError at the end of the block if an input of the stage has changed. `name` is DVC's name of it.

    Does nothing for None, and where there is no dvc.yaml.
    """
    if name is None or not Path("dvc.yaml").is_file():
        yield
        return
    before = read_inputs(name)
    os.environ[KEY] = before.key
    yield
    try:
        changed = before.differences(read_inputs(name))
    except FileNotFoundError as error:
        changed = [f"{error.filename or error}, which is gone"]
    if changed:
        raise UserError(
            f"{name}: its inputs changed while it ran: {'; '.join(changed)}; its results are those of the old inputs, "
            "so they are not recorded; start again (with the old inputs, it goes on from its checkpoints)"
        )


def check_key(inputs: Inputs) -> None:
    """Raise UserError if the inputs are not those with which the process of this stage began.

    Parameters and code are read in between, and checkpoints must not be kept under the key of others.
    """
    if os.environ.get(KEY, inputs.key) != inputs.key:
        raise UserError("the stage's parameters, code or other inputs changed while it began; start again")
