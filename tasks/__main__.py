"""`python -m tasks STAGE [BUDGET]` runs one stage of dvc.yaml: tasks/STAGE.py is its content, this file what all share.

A stage ends with the DVC that started it. It prints a line when it ends, with its time, and, where a flow or
`elastic run` started it, one when it begins. Its exit status tells whether another try may help.
"""

import importlib
import os
import sys
import time

from tasks.progress import events
from tasks.progress.durations import duration
from tasks.runtime import stop_with_dvc
from tasks.runtime.exit_status import errors_as_text
from tasks.runtime.quiet import silence_libraries
from tasks.runtime.threads import set_thread_defaults


def main() -> None:
    name, *arguments = sys.argv[1:]
    title = " ".join([name, *arguments])
    stop_with_dvc.start()
    set_thread_defaults()
    silence_libraries()
    begin, status = time.monotonic(), 1
    events.note(event="begin", stage=os.environ.get("DVC_STAGE", title))
    if events.are_wanted():
        print(f"{title} …", flush=True)
    try:
        with errors_as_text():
            importlib.import_module(f"tasks.{name}").main(*arguments)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
        raise
    finally:
        events.note(event="end", stage=os.environ.get("DVC_STAGE", title), status=status)
        how = "done" if status == 0 else f"ended with status {status}"
        print(f"{title}: {how} after {duration(time.monotonic() - begin)}", flush=True)


if __name__ == "__main__":
    main()
