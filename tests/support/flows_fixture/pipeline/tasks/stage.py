"""Stands for every stage: `python -m tasks.stage NAME` prints, waits as params.yaml says and writes its output."""

import json
import subprocess
import sys
import time
from pathlib import Path

from ruamel.yaml import YAML

from tasks.progress import events

name = sys.argv[1]
params = YAML(typ="safe").load(Path("params.yaml")).get(name, {})
events.note(event="begin", stage=name)
print(f"{name} begins")
for percent in range(0, 101, 10):
    print(f"\r{name} {percent} %", end="")
print()
if name == "train":
    rows = Path("checkpoints/train/metrics.jsonl")
    rows.parent.mkdir(parents=True, exist_ok=True)
    events.note(event="training", name="train", num_tokens=2000, num_steps=10, path=str(rows))
    if params.get("resumed_at"):
        events.note(event="resumed", name="train", step=params["resumed_at"])
    with open(rows, "w") as file:
        for step in range(1, 11):
            budgets = {["full", "small"][step % 2]: {"loss": 10.0 - step, "kl": 1 / step, "budget_error": 0.01}}
            row = {"step": step, "tokens": 200 * step, "mode": "soft", "skipped": 0, "budgets": budgets}
            print(json.dumps(row | {"tokens_per_second": 50.0, "seconds_left": 4.0 * (10 - step)}), file=file)
if status := params.get("fail"):
    print(f"{name} was told to fail", file=sys.stderr)
    events.note(event="end", stage=name, status=int(status))
    sys.exit(int(status))
if params.get("seconds"):
    # A process in a session of its own is the hardest to find again.
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    time.sleep(params["seconds"])
if name == "report":
    Path("reports").mkdir(exist_ok=True)
    Path("reports/results.json").write_text(json.dumps([{"model": "small", "loss": 2}, {"model": "large", "loss": 1}]))
    members = {"parent": {"share": 1.0, "loss": 3.4}, "small": {"share": 0.43, "loss": 3.52, "kl_to_parent": 0.2}}
    Path("reports/metrics.json").write_text(json.dumps(members))
    Path("reports/report.md").write_text("# Report\n\nAll is well.\n")
    Path("reports/report.html").write_text("<p>All is well.</p>\n")
else:
    Path("artifacts").mkdir(exist_ok=True)
    Path("artifacts", name).write_text(name)
