"""Libraries do not speak in a stage's output."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from tasks.runtime.quiet import HARMLESS


def test_a_harmless_error_of_a_library_is_not_shown_and_others_are():
    code = f"""
import logging
from tasks.runtime.quiet import silence_libraries
silence_libraries()
for name in (*{HARMLESS!r}, "ray.train"):
    logging.getLogger(name).error("from " + name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "from ray.train\n"


def test_the_names_are_those_of_modules():
    """Else nothing would be silenced; ray is not imported, because that takes seconds."""
    for name in HARMLESS:
        top, *rest = name.split(".")
        package = Path(importlib.util.find_spec(top).origin).parent
        assert package.joinpath(*rest).with_suffix(".py").is_file()
