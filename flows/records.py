"""What a finished run leaves: a directory of its own, reports/runs/NAME. It needs no Prefect.

The directory keeps the report, the results, parameters and where all of it came from, for links and for comparisons.
The workspace itself holds the files of the latest run only. Runs of the flow and of `elastic run` leave the same.
"""

import contextlib
import datetime
import filecmp
import json
import re
import shutil
import uuid
from pathlib import Path

from elastic_core.errors import UserError
from elastic_core.io.atomic import whole_directory
from tasks.runs.provenance import read_commit

NAMED = Path("reports/runs")  # a directory for every finished run
RECORD = "run.json"
TEXTS = ("name", "profile", "commit", "finished")  # fields that every record has
RESULTS, REPORT, PAGE = Path("reports/results.json"), Path("reports/report.md"), Path("reports/report.html")
METRICS = Path("reports/metrics.json")
KEPT = (RESULTS, PAGE, METRICS, Path("params.yaml"), Path("dvc.lock"))
MODELS = Path("artifacts/models")


def new_name(profile: str, now: datetime.datetime | None = None) -> str:
    """The name of a run that got none from its user: its profile, and date and time on this machine's clock."""
    return f"{profile} {now or datetime.datetime.now():%Y-%m-%d %H:%M}"


def keep(
    name: str, profile: str, workspace: Path, root: Path, parameters: dict | None = None, run: str | None = None
) -> Path:
    """Copy a run's results and write its record to reports/runs/NAME, complete or not at all; that directory.

    parameters: those with which the run was started. run: its id, which a later attempt of the same run gives again.
    """
    run = run or str(uuid.uuid4())
    directory = directory_of(name, run, root / NAMED)
    with whole_directory(directory, marker=RECORD) as partial:  # replaces that of an earlier attempt of this run
        for path in KEPT:
            if (workspace / path).is_file():
                shutil.copy2(workspace / path, partial / path.name)
        if (workspace / MODELS).is_dir():
            (partial / "models").symlink_to(workspace / MODELS)
        record = {
            "name": name,
            "id": run,
            "profile": profile,
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "parameters": {name: value for name, value in (parameters or {}).items() if value},
            "commit": commit(root),
            "workspace": str(workspace),
            "models": [str(path.parent) for path in sorted((workspace / MODELS).glob("*/*/config.json"))],
        }
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return directory


def kept_already(workspace: Path, root: Path) -> Path | None:
    """The directory of the newest run of a workspace, if its files are still those of the workspace."""
    for name in reversed(records(root)):
        directory = root / NAMED / name
        if read_record(directory).get("workspace") == str(workspace):
            files = [path for path in KEPT if (workspace / path).is_file()]
            same = all(
                (directory / path.name).is_file()
                and filecmp.cmp(workspace / path, directory / path.name, shallow=False)
                for path in files
            )
            return directory if same else None
    return None


def directory_of(name: str, run: str, where: Path) -> Path:
    """A run's directory: its name (any text), and a part of its id where another run has that name."""
    safe = safe_name(name) or run
    directory = where / safe
    try:
        is_taken = (directory / RECORD).is_file() and read_record(directory).get("id") != run
    except UserError:  # damaged, but perhaps of another run
        is_taken = True
    return where / f"{safe}-{run[:8]}" if is_taken else directory


def safe_name(name: str) -> str:
    """A run's name as the name of a directory."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")


def records(root: Path) -> list[str]:
    """Names of the finished runs' directories, in the order in which the runs finished. Damaged ones are left out."""
    found = {}
    for path in (root / NAMED).glob(f"*/{RECORD}"):
        with contextlib.suppress(UserError):
            found[path.parent.name] = read_record(path.parent)["finished"]
    return sorted(found, key=lambda name: (found[name], name))


def read_record(directory: Path) -> dict:
    """The record of a finished run: its name, profile, commit, parameters, … Raises UserError for a damaged one."""
    path = directory / RECORD
    record = read_json(path)
    if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in TEXTS):
        raise UserError(f"{path}: is not the record of a run (no texts {', '.join(TEXTS)}); remove {directory}")
    return record


def read_json(path: Path):
    """The content of a JSON file of a run. Raises UserError for a damaged one."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error}); remove {path.parent}") from None


def choose(names: list[str], before: str | None, after: str | None) -> tuple[str, str]:
    """The two runs to compare, out of `names` in the order in which they finished.

    A run may be given by its name or by its directory's. Raises UserError, with all names, for an unknown one.
    """
    for name in filter(None, (before, after)):
        if safe_name(name) not in names:
            raise UserError(f"run: got {name!r}; allowed: {', '.join(names) or 'none has finished yet'} ({NAMED}/)")
    before, after = (name and safe_name(name) for name in (before, after))
    after = after or next((name for name in reversed(names) if name != before), None)
    earlier = names[: names.index(after)] if after else []
    before = before or next(reversed(earlier), None)
    if before is None or after is None:
        raise UserError(f"comparing takes two finished runs, of which {NAMED}/ has {len(names)}: {', '.join(names)}")
    return before, after


def commit(root: Path) -> str:
    """The checkout's commit, and whether files differ from it."""
    head, is_clean = read_commit(root, paths=())
    if head is None:
        return "no commit yet"
    return head[:12] + ("" if is_clean else " with changes that are not committed")


def summary(workspace: Path) -> str:
    """The result in one line: loss and KL of every member, from metrics.json."""
    members = json.loads((workspace / METRICS).read_text())
    parts = [
        f"{name} {values['share']:.2f}: held-out loss {values['loss']:.2f}"
        + ("" if name == "parent" else f", KL {values['kl_to_parent']:.2f}")
        for name, values in members.items()
    ]
    return "; ".join(reversed(parts))  # the smallest first: a list of runs cuts off the rest
