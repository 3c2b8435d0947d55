"""The workspace of a profile: the directory in which it runs.

A profile is a set of parameters: a file in profiles/ that overrides values of params.yaml. The profile `default` runs
in the checkout. Every other profile runs in a copy of the checkout under .runs/ and keeps its results there. All copies
share the checkout's DVC cache, so a stage that has run once with the same inputs does not run again.

`python -m tasks.settings.profiles PROFILE` prepares a workspace and prints its directory.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil
from ruamel.yaml import YAML

from elastic_core.errors import UserError
from elastic_core.io.atomic import whole_file
from elastic_core.io.json_files import read_json
from tasks.settings.merging import ROOT, check_profile, parameters, read_override
from tasks.settings.paths import RUNS

DVC_LOCKS = Path(".dvc") / "tmp" / "rwlock"  # in a workspace


class InUse(UserError):
    """A DVC process works in a workspace that was to be brought up to date."""


def prepare_workspace(
    profile: str = "default",
    root: Path = ROOT,
    budgets: Mapping[str, float | str] | None = None,
    overrides: Iterable[str] = (),
) -> Path:
    """Bring the workspace of `profile` up to date with the checkout's files, and return its directory.

    `budgets` and `overrides` are as in `merging.parameters`. A run with either has its own directory; the same values
    always give the same directory. Raises UserError as that function does, and InUse while a stage runs in the
    workspace: it would find other code and parameters. Check the parameters first (`tasks.commands.check`), because
    every workspace is a copy of the checkout.
    """
    overrides = list(overrides)
    workspace = workspace_of(profile, root, budgets, overrides)
    if workspace == root:
        return root
    values = parameters(profile, root, budgets, overrides)
    if (process := dvc_process(workspace)) is not None:
        raise InUse(
            f"{workspace}: {process} runs a stage there; wait for it, or stop it (if it is no DVC, because a DVC was "
            f"killed and its number given again, remove {workspace / DVC_LOCKS})"
        )
    files = [name for name in _source_files(root) if (root / name).is_file()]
    _copy_sources(root, workspace, files + _table(values, root, files))
    with whole_file(workspace / "params.yaml") as partial:
        YAML().dump(values, partial)
    _configure_dvc(root, workspace)
    return workspace


def workspace_of(
    profile: str = "default",
    root: Path = ROOT,
    budgets: Mapping[str, float | str] | None = None,
    overrides: Iterable[str] = (),
) -> Path:
    """The directory in which a run works. Writes nothing. Raises UserError as `prepare_workspace` does."""
    check_profile(profile, root)
    changes = [read_override(text) for text in overrides]
    if not budgets and not changes:
        return root if profile == "default" else root / RUNS / profile
    description = json.dumps([dict(budgets or {}), changes], sort_keys=True, default=str)
    return root / RUNS / f"{profile}-{hashlib.sha256(description.encode()).hexdigest()[:8]}"


def working_directory(
    profile: str = "default",
    root: Path = ROOT,
    budgets: Mapping[str, float | str] | None = None,
    overrides: Iterable[str] = (),
) -> Path:
    """Where relative paths of a run start: its workspace or, as long as there is none, the checkout."""
    workspace = workspace_of(profile, root, budgets, overrides)
    return workspace if workspace.is_dir() else root


def dvc_process(workspace: Path) -> str | None:
    """The DVC process that runs a stage in a workspace, from the file in which DVC keeps its locks."""
    path = workspace / DVC_LOCKS
    if not path.is_file():
        return None
    content = _read_again(path)
    entries = [*content.get("write", {}).values(), *(one for many in content.get("read", {}).values() for one in many)]
    return next((f"process {entry['pid']}" for entry in entries if psutil.pid_exists(entry["pid"])), None)


def _read_again(path: Path, tries: int = 5) -> dict:
    """The content of a JSON file that another process may be writing in place. Raises UserError if it stays damaged."""
    while True:
        tries -= 1
        try:
            return read_json(path)
        except UserError:
            if tries == 0:
                raise
            time.sleep(0.1)


def _table(values, root: Path, files: list[str]) -> list[str]:
    """The table of latencies, if git ignores it: a dependency in dvc.yaml has to be in the workspace."""
    cost = values.get("cost")
    table = cost.get("table") if isinstance(cost, Mapping) else None
    is_inside = isinstance(table, str) and not Path(table).is_absolute() and ".." not in Path(table).parts
    return [table] if is_inside and table not in files and (root / table).is_file() else []


def _source_files(root: Path) -> list[str]:
    """Files that git tracks, and new files that it does not ignore, relative to `root`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name]


def _copy_sources(root: Path, workspace: Path, files: list[str]) -> None:
    """Copy the files that differ, and delete copies whose original is gone. Results in the workspace stay.

    `files` are paths relative to `root`.
    """
    keep = {"params.yaml", "dvc.lock", "reports/metrics.json"}  # tracked by git, but every workspace has its own
    listing = workspace / ".dvc" / "tmp" / "sources"
    copied_before = set(listing.read_text().splitlines()) if listing.is_file() else set()
    for name in copied_before - set(files) - keep:
        (workspace / name).unlink(missing_ok=True)
    for name in files:
        target = workspace / name
        if name in keep or (target.is_file() and target.read_bytes() == (root / name).read_bytes()):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target)
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("".join(name + "\n" for name in files))


def _configure_dvc(root: Path, workspace: Path) -> None:
    """Write DVC's local options: no git, the checkout's cache and, if `make setup` has written it, the plots page."""
    lines = ["[core]", "no_scm = true", "[cache]", f"dir = {root / '.dvc' / 'cache'}"]
    page = root / ".dvc" / "plots" / "page.html"
    if page.is_file():
        lines += ["[plots]", f"html_template = {page}"]
    (workspace / ".dvc" / "config.local").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile", nargs="?", default="default")
    try:
        print(prepare_workspace(parser.parse_args().profile))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
