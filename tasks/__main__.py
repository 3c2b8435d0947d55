"""`python -m tasks STAGE [BUDGET]` runs one stage of dvc.yaml: tasks/STAGE.py is its content, this file what all share.

A stage ends with the DVC that started it. It prints a line when it ends, with its time, and, where a flow or
`elastic run` started it, one when it begins. Its exit status tells whether another try may help.
"""

import importlib
import os
import pkgutil
import sys
import time
from pathlib import Path
from types import ModuleType

from elastic_core.errors import UserError
from tasks.progress import events
from tasks.progress.durations import duration
from tasks.runs import old_runs
from tasks.runs.job import is_first_process
from tasks.runs.unchanged import inputs_unchanged
from tasks.runtime import environment, garbage_collector, stop_with_dvc
from tasks.runtime.exit_status import errors_as_text
from tasks.runtime.quiet import silence_libraries


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(f"usage: python -m tasks STAGE [BUDGET]; stages: {', '.join(stages())}")
    name, *arguments = sys.argv[1:]
    title = " ".join([name, *arguments])
    stop_with_dvc.start()
    environment.set_defaults()
    silence_libraries()
    begin, status = time.monotonic(), 1
    events.note(event="begin", stage=os.environ.get("DVC_STAGE", title))
    if events.are_wanted():
        print(f"{title} …", flush=True)
    try:
        with errors_as_text(), inputs_unchanged(recorded_stage(name)):
            with garbage_collector.paused():
                stage = find_stage(name)
            if is_first_process():
                old_runs.remove_finished()
            stage.main(*arguments)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    finally:
        events.note(event="end", stage=os.environ.get("DVC_STAGE", title), status=status)
        how = "done" if status == 0 else f"ended with status {status}"
        print(f"{title}: {how} after {duration(time.monotonic() - begin)}", flush=True)


def recorded_stage(name: str) -> str | None:
    """DVC's name of this stage, if DVC will record which inputs the results of this process were made from.

    None in a process that DVC has not started, and in all but the first of a stage's processes. Also None for stage
    `fingerprint`, which has no inputs: DVC runs it every time.
    """
    return os.environ.get("DVC_STAGE") if is_first_process() and name != "fingerprint" else None


def stages() -> list[str]:
    """The names of all stages: the files in tasks/."""
    modules = pkgutil.iter_modules([str(Path(__file__).parent)])
    return [module.name for module in modules if not module.ispkg and not module.name.startswith("_")]


def find_stage(name: str) -> ModuleType:
    """The module of a stage. Raises UserError if there is none."""
    try:
        return importlib.import_module(f"tasks.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"tasks.{name}":
            raise
        raise UserError(f"stage: got {name!r}; allowed: {', '.join(stages())}") from None


if __name__ == "__main__":
    main()
