"""`elastic run`: the pipeline in this terminal, by DVC and without a server."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic_core.errors import UserError
from flows.process.output import follow
from flows.stages import reproduce, select, stage_names
from tasks.settings import profiles as workspaces


@dataclass(frozen=True)
class Selection:
    """Which stages; of those from `first` until `last` the ones in `only`, where it names any."""

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
    root: Path = workspaces.ROOT,
) -> Path:
    """Bring the selected stages of a profile up to date and show the results; its workspace.

    Raises ValueError for what the caller can mend and StageFailed for a stage that ends with an error.
    """
    if not (root / "dvc.yaml").is_file():
        raise UserError(f"{root}: no checkout (no dvc.yaml); install from one, with `pip install --editable`")
    names = stage_names(root)
    chosen = select(names, selection.first, selection.last, selection.only)
    workspace = workspaces.prepare(profile, root, budgets, overrides)
    if workspace != root:
        log(f"workspace: {workspace}")
    _check_parameters(workspace, log)
    # One DVC for all of them starts once; stage by stage it would do so nine times.
    todo: list[str | None] = [None] if chosen == names and not force else list(chosen)
    on_terminal = sys.stdout.isatty() and sys.stderr.isatty()
    for stage in todo:
        reproduce(stage, workspace, force, log, on_terminal)
    if names[-1] in chosen:
        log(_results(workspace))
    return workspace


def read_budgets(texts: Iterable[str]) -> dict[str, float | str]:
    """``NAME=BUDGET`` per member; whether a family can have such members, tasks.settings.params checks."""
    budgets = {}
    for text in texts:
        name, _, budget = text.partition("=")
        if not budget[:1].isdigit() and not budget.startswith("."):
            allowed = "NAME=BUDGET, such as small=0.4, small=9B, small=16GiB@128k or small=35ms/token"
            raise UserError(f"--budget: got {text!r}; allowed: {allowed}")
        try:
            budgets[name] = float(budget)
        except ValueError:
            budgets[name] = budget
    return budgets


def _check_parameters(workspace: Path, log: Callable[[str], None]) -> None:
    """In the workspace, where relative paths of params.yaml start, and before a stage has cost hours."""
    status, lines = follow([sys.executable, "-m", "tasks.commands.check"], workspace, lambda line: None)
    if status != 0:
        raise UserError(
            "\n".join(lines).removeprefix("error: ") or f"tasks.commands.check ended with exit status {status}"
        )
    log("\n".join(lines))


def _results(workspace: Path) -> str:
    """The report's table, and where the rest of it is."""
    table, _, _ = (workspace / "reports" / "report.md").read_text().partition("\n## Plots")
    return f"{table.rstrip()}\n\nreport: {workspace / 'reports' / 'report.html'}"
