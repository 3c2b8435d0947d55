"""`python -m tasks.commands.check`: the parameters' check, as the flow calls it."""

import sys
from pathlib import Path

from ruamel.yaml import YAML

for section, values in YAML(typ="safe").load(Path("params.yaml")).items():
    if not isinstance(values.get("seconds", 0), int):
        sys.exit(f"params.yaml: {section}.seconds: expected an integer, got {values['seconds']!r}")
