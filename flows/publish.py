"""What a finished run leaves: artifacts in the UI, and a directory of its own, reports/runs/NAME.

The directory keeps the report, the results, parameters and provenance, for links and for comparisons
(flows/compare.py). The workspace itself holds the files of the latest run only.
"""

import datetime
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote

from prefect import runtime
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from elastic_core.errors import UserError
from elastic_core.io.atomic import whole_directory
from flows.compare import NAMED, RECORD, changes, read_record, records

RESULTS, REPORT, PAGE = Path("reports/results.json"), Path("reports/report.md"), Path("reports/report.html")
KEPT = (RESULTS, PAGE, Path("reports/metrics.json"), Path("params.yaml"), Path("dvc.lock"))
MODELS = Path("artifacts/models")
FILES_URL = "ELASTIC_FILES_URL"  # where the dashboard serves reports/runs; in the environment of its runs


def results(profile: str, workspace: Path, root: Path) -> None:
    """Keep the run's results in a directory of its own, and show them in the UI."""
    table, report = read_results(workspace), (workspace / REPORT).read_text()
    directory = keep(profile, workspace, root)
    create_table_artifact(key="results", table=table, description=f"Results of profile `{profile}` ({RESULTS})")
    create_markdown_artifact(key="report", markdown=report, description=f"Report of profile `{profile}`")
    create_markdown_artifact(key="run", markdown=describe(directory), description="Where all of it is, and came from")
    if url := address(directory):
        create_link_artifact(key="report-page", link=f"{url}/{PAGE.name}", description="The report as one HTML file")
    earlier = [name for name in records(root) if name != directory.name]
    if same := [name for name in earlier if read_record(root / NAMED / name)["profile"] == profile]:
        create_table_artifact(
            key="changes",
            table=changes(root / NAMED / same[-1], directory),
            description=f"Since run `{same[-1]}` of this profile; the flow `compare` takes any two runs",
        )


def read_results(workspace: Path) -> list[dict]:
    """The results table; its rows have the same keys."""
    for path in (RESULTS, REPORT):
        if not (workspace / path).is_file():
            raise FileNotFoundError(
                f"{path} is not there after the last stage; the stage that writes it is in dvc.yaml"
            )
    rows = json.loads((workspace / RESULTS).read_text())
    keys = [list(row) for row in rows]
    if not keys or any(row_keys != keys[0] for row_keys in keys):
        # The table's columns are those of its first row.
        raise UserError(f"{RESULTS}: expected a list of rows with the same keys in each, got the keys {keys}")
    return rows


def keep(profile: str, workspace: Path, root: Path) -> Path:
    """Copy a run's results and write its record to reports/runs/NAME, whole or not at all; that directory."""
    directory = directory_of(runtime.flow_run.name, runtime.flow_run.id, root / NAMED)
    with whole_directory(directory, marker=RECORD) as partial:  # replaces that of an earlier attempt of this run
        for path in KEPT:
            if (workspace / path).is_file():
                shutil.copy2(workspace / path, partial / path.name)
        if (workspace / MODELS).is_dir():
            (partial / "models").symlink_to(workspace / MODELS)
        record = {
            "name": runtime.flow_run.name,
            "id": runtime.flow_run.id,
            "profile": profile,
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "parameters": {name: value for name, value in runtime.flow_run.parameters.items() if value},
            "commit": commit(root),
            "workspace": str(workspace),
            "models": [str(path.parent) for path in sorted((workspace / MODELS).glob("*/*/config.json"))],
        }
        (partial / RECORD).write_text(json.dumps(record, indent=1, default=_plain) + "\n")
    return directory


def directory_of(name: str, run: str, where: Path) -> Path:
    """A run's directory: its name (any text), and a part of its id where another run has that name."""
    safe = re.sub(r"[^\w.-]+", "-", name).strip("-.") or run
    directory = where / safe
    taken = (directory / RECORD).is_file() and read_record(directory).get("id") != run
    return where / f"{safe}-{run[:8]}" if taken else directory


def _plain(value):
    return value.model_dump()  # of the flow's parameters only the budgets are no plain values


def commit(root: Path) -> str:
    """The checkout's commit, and whether files differ from it."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)

    head = git("rev-parse", "--short=12", "HEAD")
    if head.returncode != 0:
        return "no commit yet"
    return head.stdout.strip() + (" with changes that are not committed" if git("status", "--porcelain").stdout else "")


def address(directory: Path) -> str | None:
    """The URL of a run's directory, where the dashboard serves them."""
    base = os.environ.get(FILES_URL)
    return f"{base}/{quote(directory.name)}" if base else None


def describe(directory: Path) -> str:
    """A run's provenance, with links to its files, in Markdown."""
    record, url = read_record(directory), address(directory)

    def link(text: str, target: str) -> str:
        return f"[{text}]({url}/{quote(target)})" if url else text

    rows = {
        "run": f"{record['name']}, finished {record['finished'].replace('T', ' ').replace('+00:00', ' UTC')}",
        "commit": record["commit"],
        "workspace": f"`{record['workspace']}`",
    }
    rows |= {name: f"`{json.dumps(value)}`" for name, value in record["parameters"].items()}
    files = [path.name for path in sorted(directory.iterdir()) if path.is_file()]
    rows["files"] = ", ".join(link(name, name) for name in files)
    rows["kept in"] = f"`{directory}`"
    versions = {}
    for model in map(Path, record["models"]):
        versions.setdefault(model.parent, []).append(link(model.name, f"models/{model.parent.name}/{model.name}/"))
    for budget, links in versions.items():
        rows[f"models {budget.name}"] = f"{', '.join(links)} in `{budget.relative_to(record['workspace'])}`"
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())]) + "\n"
