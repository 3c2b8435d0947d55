"""`python -m tasks.commands.check PROFILE --set … --budget …`: the parameters' check, as the flow calls it."""

import argparse
import sys
from pathlib import Path

from tasks.settings.merging import parameters

parser = argparse.ArgumentParser()
parser.add_argument("profile")
parser.add_argument("--set", action="append", default=[])
parser.add_argument("--budget", action="append", default=[])
given = parser.parse_args()
for section, values in parameters(given.profile, Path.cwd(), None, given.set).items():
    if not isinstance(values.get("seconds", 0), int):
        sys.exit(f"error: params.yaml: {section}.seconds: got {values['seconds']!r}; allowed: an integer")
