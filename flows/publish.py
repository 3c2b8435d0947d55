"""What a finished run of the flow shows in the UI: artifacts, a name, and its result in one line.

flows/records.py keeps the run's files, which the artifacts link to.
"""

import json
import os
import re
from pathlib import Path
from urllib.parse import quote

from prefect import runtime
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from elastic_core.errors import UserError
from flows.differences import changes
from flows.records import NAMED, PAGE, REPORT, RESULTS, keep, new_name, read_record, records

FILES_URL = "ELASTIC_FILES_URL"  # where the dashboard serves reports/runs; in the environment of its runs
# Names that users have not given: Prefect's, such as onyx-spaniel, and the form's date and time (dashboard/pages.js).
MADE_UP = re.compile(r"[a-z]+-[a-z]+|\d{4}-\d\d-\d\d \d\d:\d\d")


def run_name(of_ours: str) -> str:
    """The name of the present run: `of_ours` in place of a name that Prefect made up, else the user's."""
    given = runtime.flow_run.name
    return of_ours if not given or MADE_UP.fullmatch(given) else given


def profile_and_time() -> str:
    """The name of a run of the flow `elastic`, such as `smoke 2026-11-29 21:43`."""
    return run_name(new_name(runtime.flow_run.parameters["profile"]))


def results(profile: str, workspace: Path, root: Path) -> None:
    """Keep the run's results in a directory of its own, and show them in the UI."""
    table, report = read_results(workspace), (workspace / REPORT).read_text()
    run = runtime.flow_run
    directory = keep(run.name, profile, workspace, root, run.parameters, run.id)
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
