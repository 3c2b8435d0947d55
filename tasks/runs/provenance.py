"""Where a result comes from: a record per stage, which travels with the data, the models and the report.

A record says when and on which device a stage ran, from which commit, parameters, inputs and libraries. The stages
before training write theirs to ``artifacts/provenance``. It does not belong to their results: if a stage runs again and
gives the same result, later stages shall not run again for its new date. An elastic checkpoint and every export have a
file ``provenance.json``: the records of all stages that their weights come from, in order.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

from elastic_core.io.atomic import write_text
from elastic_core.io.json_files import read_json
from elastic_core.io.provenance_file import FILE, RECORD
from tasks.runs.key import Inputs

RECORDS = Path("artifacts/provenance")
FINGERPRINTS = Path("artifacts/inputs")
CODE = tuple(f":/{name}" for name in ("tasks", "elastic_core", "dvc.yaml", "requirements.lock"))
CPU_INFO = Path("/proc/cpuinfo")


def begin(stage: str, key: str, inputs: Inputs) -> dict:
    """The record of a stage that begins now, in the working directory.

    - `key`: that of its run. `commit`: of the checkout; `clean`: whether the checkout had no other changes.
    - `parameters`, `libraries`, `files`: see `Inputs`; `files` are inputs and code.
    - `fingerprints`: those of the corpora, the parent or the benchmarks that the stage reads.
    - `started`: the time in UTC.
    """
    commit, clean = read_commit(Path())
    return {
        "stage": stage,
        "key": key,
        "commit": commit,
        "clean": clean,
        "started": now(),
        "parameters": inputs.parameters,
        "libraries": inputs.libraries,
        "files": inputs.files,
        "fingerprints": {
            Path(path).stem: read_json(path) for path in inputs.files if Path(path).is_relative_to(FINGERPRINTS)
        },
    }


def end(record: dict, seconds: float, device: str, **more) -> dict:
    """The record of a stage that has ended. `seconds`: how long it worked, without interruptions."""
    return {**record, "finished": now(), "seconds": round(seconds, 1), "device": device, **more}


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def git(directory: Path, *arguments: str) -> str | None:
    """What a git command prints in `directory`. None if it fails, as outside a repository or where git is missing."""
    try:
        done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def read_commit(directory: Path, paths: Sequence[str] = CODE) -> tuple[str | None, bool]:
    """The commit of the checkout around `directory`, and whether `paths` are as in it. (None, False) outside git.

    By default, `paths` is the pipeline's code, because records have parameters and inputs themselves. With no path, all
    files count.
    """
    head = git(directory, "rev-parse", "HEAD")
    return head, head is not None and not git(directory, "status", "--porcelain", "--", *paths)


def processor_name() -> str:
    """The name of this machine's processor. Linux writes it to a file; `platform` does not know it there."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def processor() -> str:
    """The name of this machine's processor, with its number of cores."""
    return f"{processor_name()} ({os.cpu_count()} cores)"


def describe_device(device=None, world: int = 1) -> str:
    """The name of a torch device, or of this machine's processor (None), and how many workers had one."""
    name = processor()
    if device is not None and device.type == "cuda":
        import torch  # slow; stages without it describe their processor

        name = torch.cuda.get_device_name(device)
    return name if world == 1 else f"{world} × {name}"


def write_record(record: dict) -> None:
    """Write the record of a stage before training to its file."""
    write_text(RECORDS / f"{record['stage']}.json", json.dumps(record, indent=1) + "\n")


def read_records(*stages: str) -> list[dict]:
    """The records that these stages have written. A record that is not there is left out."""
    paths = [RECORDS / f"{stage}.json" for stage in stages]
    return [read_json(path, shape=RECORD) for path in paths if path.is_file()]


def write(directory: str | os.PathLike, records: list[dict]) -> None:
    """Write the records of a model directory."""
    write_text(Path(directory) / FILE, json.dumps({"stages": records}, indent=1) + "\n")
