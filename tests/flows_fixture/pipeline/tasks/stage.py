"""Stands for every stage: `python -m tasks.stage NAME` prints, waits as params.yaml says and writes its output."""

import json
import subprocess
import sys
import time
from pathlib import Path

from ruamel.yaml import YAML

name = sys.argv[1]
params = YAML(typ="safe").load(Path("params.yaml")).get(name, {})
print(f"{name} begins")
for percent in range(0, 101, 10):
    print(f"\r{name} {percent} %", end="")
print()
if params.get("fail"):
    sys.exit(f"{name} was told to fail")
if params.get("seconds"):
    # A process in a session of its own is the hardest to find again.
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    time.sleep(params["seconds"])
if name == "report":
    Path("reports").mkdir(exist_ok=True)
    Path("reports/results.json").write_text(json.dumps([{"model": "small", "loss": 2}, {"model": "large", "loss": 1}]))
    Path("reports/report.md").write_text("# Report\n\nAll is well.\n")
else:
    Path("artifacts").mkdir(exist_ok=True)
    Path("artifacts", name).write_text(name)
