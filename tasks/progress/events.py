"""Events of a stage, for the process that started it: a JSON line each, in the file named by ELASTIC_EVENTS.

- ``{"event": "begin", "stage": NAME}`` and ``{"event": "end", "stage": NAME, "status": EXIT_STATUS}``: a stage;
- ``{"event": "training", "name": …, "num_tokens": …, "num_steps": …, "path": …}``: training begins, its rows are in a
  file of metrics (metrics_file.py);
- ``{"event": "resumed", "name": …, "step": …}``: training went on from the checkpoint of that step, and not from the
  start. It comes with the first row.

Without the variable nothing is written. This module needs the standard library only.
"""

import json
import os

VARIABLE = "ELASTIC_EVENTS"


def are_wanted() -> bool:
    """Whether a process reads the events."""
    return VARIABLE in os.environ


def note(**event) -> None:
    """Add an event in one write, so that lines of several processes do not mix."""
    if are_wanted():
        with open(os.environ[VARIABLE], "a") as file:
            file.write(json.dumps(event) + "\n")
