"""Libraries do not speak in a stage's output."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from tasks.runtime.quiet import HARMLESS, HARMLESS_THREAD

CODE = f"""
import logging, threading
from tasks.runtime.quiet import silence_libraries
silence_libraries()
for name in (*{HARMLESS!r}, "ray.train"):
    logging.getLogger(name).error("from " + name)
for name in ({HARMLESS_THREAD!r}, "mine"):
    thread = threading.Thread(target=int, args=(name,), name=name)
    thread.start()
    thread.join()
"""


def test_harmless_errors_of_a_library_are_not_shown_and_others_are():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    first, *rest = done.stderr.splitlines()
    assert first == "from ray.train" and rest[0] == "Exception in thread mine:"
    assert done.stderr.count("Traceback") == 1 and rest[-1].endswith("'mine'")


def test_the_names_are_those_of_ray():
    """Else nothing would be silenced. Ray is not imported, because that takes seconds."""
    package = Path(importlib.util.find_spec("ray").origin).parent
    for name in HARMLESS:
        assert package.joinpath(*name.split(".")[1:]).with_suffix(".py").is_file()
    actor = package / "train/v2/_internal/execution/controller/placement_group_cleaner.py"
    assert f'name="{HARMLESS_THREAD}"' in actor.read_text()
