"""The pipeline with `train_short`, run once; cheap copies of it for trials; and what a run of the stage has left."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ruamel.yaml import YAML

from tests.soak.processes import environment, new_mark

ROOT = Path(__file__).resolve().parents[2]
STAGE = "train_short"
OUT = Path("artifacts") / STAGE
TIMES = ("memory_bytes", "seconds", "tokens_per_second", "seconds_left")  # of a row of metrics: differ in every run
FIRST = ("fingerprint", "prepare_data", "parent", "rank", STAGE)
FIRST_RUN = f"from tasks import {', '.join(FIRST)}\nfor stage in ({', '.join(FIRST)}): stage.main()"
# The stage's work on several ranks without Ray, so that what Ray does is compared with something else.
RANKS = """
import os, sys, traceback
import torch.distributed as dist
from elastic_core.training.distributed.ranks import Ranks
from tasks import train_short
from tasks.runs.job import started
from tasks.settings import load

def work(rank, world, settings, job):
    dist.init_process_group("gloo", init_method="file://" + os.path.abspath("group"), rank=rank, world_size=world)
    train_short.work({"settings": settings, "job": job}, Ranks.current())
    dist.destroy_process_group()

settings, children = load.load(), []
with started("train_short", settings) as job:
    for rank in range(world := int(sys.argv[1])):
        children.append(os.fork())
        if children[-1] == 0:
            failed = True
            try:
                work(rank, world, settings, job)
                failed = False
            finally:
                if failed:
                    traceback.print_exc()
                os._exit(failed)
    failed = any([os.waitpid(child, 0)[1] for child in children])
sys.exit(failed)
"""


@dataclass
class Prepared:
    """A directory with a workspace that is ready for the stage, and what uninterrupted runs of it ended at."""

    directory: Path
    references: dict[int, dict] = field(default_factory=dict)  # number of workers → outcome

    @property
    def base(self) -> Path:
        return self.directory / "checkout" / ".runs" / "soak"


def prepare(directory: Path, steps: int | None = None) -> Prepared:
    """Copy the checkout's files to `directory`, and run the stages up to `train_short` in a workspace of theirs.

    What the last one ends at is the reference of runs without workers.
    """
    prepared, checkout = Prepared(directory), directory / "checkout"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, checkout / name)
    profile = YAML().load(Path(__file__).with_name("profile.yaml"))
    if steps is not None:
        profile[STAGE]["steps"] = steps
    YAML().dump(profile, checkout / "profiles" / "soak.yaml")
    run(["git", "init", "-q"], checkout)
    run([sys.executable, "-m", "tasks.settings.profiles", "soak"], checkout)
    run([sys.executable, "-c", FIRST_RUN], prepared.base)
    prepared.references[0] = outcome(prepared.base)
    return prepared


def run(command: list[str], directory: Path) -> str:
    """Run a command that has to succeed; its output."""
    done = subprocess.run(command, cwd=directory, env=environment(new_mark()), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)[:80]} in {directory}: {done.stderr[-3000:]}")
    return done.stdout


def copy(prepared: Prepared, directory: Path, workers: int = 0, storage: Path | None = None) -> Path:
    """A workspace like the prepared one, with a DVC cache of its own and nothing of the stage yet."""
    shutil.copytree(prepared.base, directory, ignore=shutil.ignore_patterns("checkpoints", STAGE))
    (directory / ".dvc" / "config.local").write_text("[core]\n    no_scm = true\n")
    yaml, path = YAML(), directory / "params.yaml"
    parameters = yaml.load(path)
    parameters["compute"]["workers"] = workers
    if workers:  # their steps take several times as long
        parameters[STAGE]["steps"] //= 4
    if storage is not None:
        parameters["compute"]["storage"] = str(storage)
    yaml.dump(parameters, path)
    return directory


def make_reference(prepared: Prepared, workers: int) -> None:
    """Run the stage without interruption on so many ranks, whose processes are forks of one."""
    workspace = copy(prepared, prepared.directory / f"reference-{workers}", workers)
    run([sys.executable, "-c", RANKS, str(workers)], workspace)
    prepared.references[workers] = outcome(workspace)


def outcome(workspace: Path) -> dict:
    """What the stage has left: the digest of every file, and the rows of metrics without times."""
    left = {}
    for path in sorted((workspace / OUT).rglob("*")):
        if path.is_file() and path.name != "provenance.json":  # says when the run began
            left[str(path.relative_to(workspace / OUT))] = hashlib.sha256(path.read_bytes()).hexdigest()
    rows = []
    if "metrics.jsonl" in left:
        del left["metrics.jsonl"]
        for line in (workspace / OUT / "metrics.jsonl").read_text().splitlines():
            rows.append({key: value for key, value in json.loads(line).items() if key not in TIMES})
    return {"files": left, "rows": rows}


def differences(found: dict, expected: dict) -> list[str]:
    """How an outcome differs from an uninterrupted run's, if it does."""
    names = sorted(found["files"].keys() | expected["files"].keys())
    problems = [f"{name} differs" for name in names if found["files"].get(name) != expected["files"].get(name)]
    ours, theirs = ({row["step"]: row for row in side["rows"]} for side in (found, expected))
    if [row["step"] for row in found["rows"]] != list(theirs):
        problems.append(f"rows of metrics: steps missing {sorted(theirs.keys() - ours.keys())[:5]} or out of order")
    problems += [f"row {step} of metrics differs" for step in theirs if step in ours and ours[step] != theirs[step]][:3]
    return problems


def checkpoint_directory(workspace: Path, storage: Path | None = None) -> Path | None:
    """Where the stage's checkpoints are, once there are any."""
    found = [path.parent for path in (storage or workspace / "checkpoints").glob(f"{STAGE}-*/step-*")]
    return found[0] if found else None


def num_rows(workspace: Path) -> int:
    """How many steps the run has shown so far."""
    files = list((workspace / "checkpoints").glob(f"{STAGE}-*/metrics.jsonl"))
    return files[0].read_bytes().count(b"\n") if files else 0
