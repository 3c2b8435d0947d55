"""What `elastic run` does: the pipeline in this terminal, by DVC and without a server."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic_core.errors import UserError
from flows.process.output import follow
from flows.records import NAMED, keep, kept_already, new_name
from flows.stages import WrongParameters, check_checkout, check_command, reproduce, select, stage_names
from flows.tables import aligned
from tasks.runs.job import CONTINUE, LOCAL, RUN, names_of_runs
from tasks.runs.workspace import prepared
from tasks.settings import merging, profiles


@dataclass(frozen=True)
class Selection:
    """Which stages run: those from `first` until `last`, and of these the ones in `only`, where it names any."""

    first: str | None = None
    last: str | None = None
    only: Sequence[str] = ()


def run_pipeline(
    profile: str,
    selection: Selection,
    budgets: Mapping[str, float | str] | None,
    overrides: Iterable[str],
    force: bool,
    log: Callable[[str], None],
    root: Path = profiles.ROOT,
    old_run: str | None = None,
) -> Path:
    """Bring the selected stages of a profile up to date and show the results; its workspace.

    Raises UserError for what the caller can change, and StageFailed for a stage that ends with an error.
    """
    check_checkout(root)
    names = stage_names(root)
    chosen = select(names, selection.first, selection.last, selection.only)
    overrides = list(overrides)
    _check_parameters(profile, root, budgets, overrides, log)
    with prepared(profile, root, budgets, overrides, log) as workspace:
        if workspace != root:
            log(f"workspace: {workspace}")
        if old_run is not None:
            check_old_run(workspace, old_run)
            os.environ[CONTINUE] = old_run  # for the stages
        # One DVC process for all stages starts once; one per stage would start nine times.
        todo: list[str | None] = [None] if chosen == names and not force else list(chosen)
        on_terminal = sys.stdout.isatty() and sys.stderr.isatty()
        ran = [name for stage in todo for name in reproduce(stage, workspace, force, log, on_terminal)]
        if not ran:
            log("nothing has changed: all stages are up to date")
        if names[-1] in chosen:
            log(results(workspace))
            log(record(profile, workspace, root, selection, budgets or {}, overrides, force))
        return workspace


def check_old_run(workspace: Path, name: str) -> None:
    """Raise UserError if a workspace has no run of this name to go on from."""
    if not (workspace / LOCAL / name / RUN).is_file():
        names = names_of_runs(workspace)
        raise UserError(f"--continue: got {name!r}; allowed: a run in {workspace / LOCAL} that has not ended ({names})")


def record(
    profile: str,
    workspace: Path,
    root: Path,
    selection: Selection,
    budgets: Mapping[str, float | str],
    overrides: Sequence[str],
    force: bool,
) -> str:
    """Keep the run as runs of the dashboard are kept, unless the newest run of the workspace is the same; a line."""
    directory = kept_already(workspace, root)
    if directory is None:
        started_with = {  # named as the parameters of the flow
            "from_stage": selection.first,
            "until_stage": selection.last,
            "only_stages": list(selection.only),
            "budgets": [f"{name}={budget}" for name, budget in budgets.items()],
            "overrides": overrides,
            "force": force,
        }
        directory = keep(new_name(profile), profile, workspace, root, started_with)
    return f"run: {directory.name} (in {NAMED}; two runs are compared by `elastic compare`)"


def _check_parameters(
    profile: str, root: Path, budgets: Mapping[str, float | str] | None, overrides: Sequence[str], log
) -> None:
    """Check what the run would have as parameters, before it has a workspace and before a stage has cost hours."""
    merging.parameters(profile, root, budgets, overrides)  # what cannot be read is refused before a process starts
    lines: list[str] = []
    status, _ = follow(check_command(profile, budgets, overrides), root, lines.append)
    if status != 0:
        problems = [line.removeprefix("error: ") for line in lines]
        raise WrongParameters("\n".join(problems) or f"tasks.commands.check ended with exit status {status}")
    log("\n".join(lines))


def results(workspace: Path) -> str:
    """A row per member of the family, in at most 100 columns, and where the report is."""
    members = json.loads((workspace / "reports" / "metrics.json").read_text())
    rows = [("model", "parameters", "share", "held-out loss", "KL to parent", "time × parent", "weights + cache, MiB")]
    for name, values in members.items():
        rows.append(
            (
                name,
                f"{values['parameters']:,}",
                f"{values['share']:.2f}",
                f"{values['loss']:.4f}",
                f"{values['kl_to_parent']:.4f}",
                f"{values['latency_ratio']:.2f}",
                f"{values['weight_mib'] + values['cache_mib']:,.2f}",
            )
        )
    return f"\n{aligned(rows, right_from=1)}\n\nreport: {workspace / 'reports' / 'report.html'}"
