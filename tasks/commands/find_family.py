"""Finds the trained family that a command works on: in a given directory, or from the last run."""

from pathlib import Path

from elastic_core.errors import UserError
from elastic_core.io.json_files import read_json
from tasks.settings.merging import ROOT

FAMILY = Path("artifacts/train_extended/model")  # inside a workspace; stage train_extended writes it


def find(directory: Path | None = None, root: Path = ROOT) -> Path:
    """The directory of a model: `directory` itself, or the trained family of the workspace `directory`.

    With None, the finished family of the last run in any workspace below `root`; a run that has not yet trained its
    family does not count. Raises UserError if there is none.
    """
    if directory is None:
        families = [family for workspace in workspaces(root) if _is_finished(family := workspace / FAMILY)]
        if not families:
            raise UserError(f"no run in {root} has trained a family yet; run `elastic run` first, or name a directory")
        # Compare times of directories, not of files: DVC may link files from its cache, and a link keeps the old time.
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
    """All workspaces: the checkout `root`, and the directories in .runs/."""
    return [root, *sorted(path for path in (root / ".runs").glob("*") if path.is_dir())]


def budget_names(family: Path) -> list[str]:
    """Names of a family's budgets; an empty list for a directory that is no family."""
    file = family / "elastic.json"
    return list(read_json(file, shape={"budgets": dict})["budgets"]) if file.is_file() else []


def _is_finished(family: Path) -> bool:
    """Whether a stage has written all of a family. The stage writes its budgets last, after all weights."""
    return _is_model(family) and (family / "elastic.json").is_file()


def _is_model(directory: Path) -> bool:
    return (directory / "config.json").is_file()
