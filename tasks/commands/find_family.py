"""Which trained family a command is about: the named directory's, or that of the last run."""

import json
from pathlib import Path

from elastic_core.errors import UserError
from tasks.settings.profiles import ROOT

FAMILY = Path("artifacts/train_extended/model")  # inside a workspace, see tasks.extract


def find(directory: Path | None = None, root: Path = ROOT) -> Path:
    """The model directory that `directory` is, or that the run in it ended with; None: that of the last run.

    Raises ValueError where there is none.
    """
    if directory is None:
        families = [family for workspace in workspaces(root) if _is_model(family := workspace / FAMILY)]
        if not families:
            raise UserError(
                f"no run in {root} has ended with a family yet; run `elastic run` first, or name a directory"
            )
        # The directory's time and not its files': with DVC's links those are as old as the cache's.
        return max(families, key=lambda family: family.stat().st_mtime)
    for candidate in (directory, directory / FAMILY):
        if _is_model(candidate):
            return candidate
    raise UserError(
        f"{directory}: "
        + ("no config.json in it" if directory.is_dir() else "no such directory")
        + f"; allowed: a model directory, or one with a finished run ({FAMILY}/config.json)"
    )


def workspaces(root: Path = ROOT) -> list[Path]:
    """Where profiles have run: the checkout, and the directories in .runs/."""
    return [root, *sorted(path for path in (root / ".runs").glob("*") if path.is_dir())]


def budget_names(family: Path) -> list[str]:
    """The budgets of a family, none for a directory that has none."""
    file = family / "elastic.json"
    return list(json.loads(file.read_text())["budgets"]) if file.is_file() else []


def _is_model(directory: Path) -> bool:
    return (directory / "config.json").is_file()
