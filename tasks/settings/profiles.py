"""The workspace of a profile: the directory in which it runs.

A profile is a set of parameters: a file in profiles/ that overrides values of params.yaml. The profile `default` runs
in the checkout. Every other profile runs in a copy of the checkout under .runs/ and keeps its results there. All copies
share the checkout's DVC cache, so a stage that has run once with the same inputs does not run again.

`python -m tasks.settings.profiles PROFILE` prepares a workspace and prints its directory.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from ruamel.yaml import YAML, YAMLError

from elastic_core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
OVERRIDE_FORM = "section.key=value, such as train_short.learning_rate=1e-3"
OVERRIDE = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*=.+"  # the syntax of `dvc exp run -S`: train_short.steps=100


def profile_names(root: Path = ROOT) -> list[str]:
    """Names of all profiles: `default`, then the files in profiles/ in alphabetical order."""
    return ["default", *sorted(path.stem for path in (root / "profiles").glob("*.yaml") if path.stem != "default")]


def prepare_workspace(
    profile: str = "default",
    root: Path = ROOT,
    budgets: Mapping[str, float | str] | None = None,
    overrides: Iterable[str] = (),
) -> Path:
    """Bring the workspace of `profile` up to date with the checkout's files, and return its directory.

    budgets: name → budget; replaces the family. If the names differ from the profile's, the new members share the
        training equally.
    overrides: ``section.key=value`` with the value in YAML.

    A run with `budgets` or `overrides` has its own directory; the same values always give the same directory. Raises
    UserError for an unknown profile and for an override that cannot be parsed. Whether the parameter exists and allows
    the value is checked later, by `tasks.settings.load`.
    """
    check_profile(profile, root)
    overrides = list(overrides)
    changes = [read_override(text) for text in overrides]
    if profile == "default" and not budgets and not changes:
        return root
    values = parameters(profile, root, budgets, overrides)
    workspace = root / ".runs" / _directory_name(profile, budgets, changes)
    _copy_sources(root, workspace, [name for name in _source_files(root) if (root / name).is_file()])
    YAML().dump(values, workspace / "params.yaml")
    _configure_dvc(root, workspace)
    return workspace


def _directory_name(
    profile: str, budgets: Mapping[str, float | str] | None, changes: list[tuple[list[str], object]]
) -> str:
    if not budgets and not changes:
        return profile
    description = json.dumps([dict(budgets or {}), changes], sort_keys=True, default=str)
    return f"{profile}-{hashlib.sha256(description.encode()).hexdigest()[:8]}"


def check_profile(profile: str, root: Path = ROOT) -> None:
    """Raise UserError for a profile that does not exist."""
    names = profile_names(root)
    if profile not in names:
        raise UserError(f"profile: got {profile!r}; allowed: {', '.join(names)} (files in profiles/)")


def parameters(
    profile: str = "default",
    root: Path = ROOT,
    budgets: Mapping[str, float | str] | None = None,
    overrides: Iterable[str] = (),
):
    """The content of params.yaml with the values of a profile, of `budgets` and of `overrides`; comments are kept.

    Raises UserError as `prepare_workspace` does.
    """
    check_profile(profile, root)
    yaml = YAML()
    values = yaml.load(root / "params.yaml")
    if profile != "default":
        _merge(values, yaml.load(root / "profiles" / f"{profile}.yaml") or {})
    if budgets:
        _replace_budgets(values, budgets)
    for path, value in map(read_override, overrides):
        _set_value(values, path, value)
    return values


def read_override(text: str) -> tuple[list[str], object]:
    """The path of keys, and the value. Raises UserError for another form and for a value that is not YAML."""
    if not re.fullmatch(OVERRIDE, text):
        raise UserError(f"override: got {text!r}; allowed: {OVERRIDE_FORM}")
    name, _, value = text.partition("=")
    try:
        return name.split("."), YAML(typ="safe").load(value)
    except YAMLError:
        raise UserError(f"override: got {text!r}; the value is not valid YAML") from None


def _set_value(values, path: list[str], value) -> None:
    """Set the value at a path of keys, in place; missing sections are created."""
    for key in path[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[path[-1]] = value


def _replace_budgets(values, budgets: Mapping[str, float | str]) -> None:
    """Replace the family, and remove options of stages that name budgets which no longer exist."""
    values["budgets"] = dict(budgets)
    for section in filter(lambda section: isinstance(section, dict), values.values()):
        if set(section.get("budget_shares", budgets)) != set(budgets):
            del section["budget_shares"]
        if not set(section.get("loss_by_budget", ())) <= set(budgets):
            del section["loss_by_budget"]


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


def _merge(values, overrides) -> None:
    """Override nested values in place. Unknown keys are kept; `tasks.settings.load` refuses them later.

    Some sections have keys that the user chooses, such as names of budgets and of sources. Merging them would mix two
    lists of names, so these sections are replaced as a whole.
    """
    replaced = {"budgets", "untrained", "budget_shares", "mixture", "sources", "loss_by_budget", "path"}
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict) and key not in replaced:
            _merge(values[key], value)
        else:
            values[key] = value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile", nargs="?", default="default")
    try:
        print(prepare_workspace(parser.parse_args().profile))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
