"""Where a profile runs: the default in the checkout, any other in a copy under .runs/, with its own results.

`python -m tasks.settings.profiles PROFILE` prepares it and prints its directory. A profile is a file in profiles/ that
overrides values of params.yaml; single values can be overridden on top, for one run and those like it. The copy
shares the checkout's DVC cache, so that stages which some run has done before are not done again.
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
OVERRIDE = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*=.+"  # as `dvc exp run -S` takes it: train_short.steps=100


def profile_names(root: Path = ROOT) -> list[str]:
    """The profiles that can run: `default`, and the files in profiles/."""
    return ["default", *sorted(path.stem for path in (root / "profiles").glob("*.yaml") if path.stem != "default")]


def prepare(
    profile: str = "default",
    root: Path = ROOT,
    budgets: Mapping[str, float | str] | None = None,
    overrides: Iterable[str] = (),
) -> Path:
    """The directory in which `profile` runs, brought up to date with the checkout's tracked and new files.

    `budgets` replaces the family, whose members then share the training evenly unless their names are the old ones.
    `overrides`: ``section.key=value``, the value in YAML. With either, the run gets a directory of its own, the same
    one for the same values. Raises ValueError for an unknown profile and an override that cannot be read; whether
    there is such a parameter, and takes such a value, tasks.settings.params checks.
    """
    check_profile(profile, root)
    overrides = list(overrides)
    changes = [_read_override(text) for text in overrides]
    if profile == "default" and not budgets and not changes:
        return root
    values = parameters(profile, root, budgets, overrides)
    workspace = root / ".runs" / _directory_name(profile, budgets, changes)
    _mirror(root, workspace, [name for name in _source_files(root) if (root / name).is_file()])
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
    """Raise ValueError for a profile that is not there."""
    names = profile_names(root)
    if profile not in names:
        raise UserError(f"profile: got {profile!r}; allowed: {', '.join(names)} (files in profiles/)")


def parameters(
    profile: str = "default",
    root: Path = ROOT,
    budgets: Mapping[str, float | str] | None = None,
    overrides: Iterable[str] = (),
):
    """params.yaml, comments and all, with the values of the profile, of another family and of overrides."""
    check_profile(profile, root)
    yaml = YAML()
    values = yaml.load(root / "params.yaml")
    if profile != "default":
        _merge(values, yaml.load(root / "profiles" / f"{profile}.yaml") or {})
    if budgets:
        _replace_budgets(values, budgets)
    for path, value in map(_read_override, overrides):
        _set(values, path, value)
    return values


def _read_override(text: str) -> tuple[list[str], object]:
    if not re.fullmatch(OVERRIDE, text):
        raise UserError(f"override: got {text!r}; allowed: section.key=value, such as train_short.learning_rate=1e-3")
    name, _, value = text.partition("=")
    try:
        return name.split("."), YAML(typ="safe").load(value)
    except YAMLError:
        raise UserError(f"override: got {text!r}, whose value is not valid YAML") from None


def _set(values, path: list[str], value) -> None:
    for key in path[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[path[-1]] = value


def _replace_budgets(values, budgets: Mapping[str, float | str]) -> None:
    values["budgets"] = dict(budgets)
    for section in filter(lambda section: isinstance(section, dict), values.values()):
        if set(section.get("budget_shares", budgets)) != set(budgets):
            del section["budget_shares"]
        if not set(section.get("loss_by_budget", ())) <= set(budgets):
            del section["loss_by_budget"]


def _source_files(root: Path) -> list[str]:
    """Files that git tracks or would track, relative to `root`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name]


def _mirror(root: Path, workspace: Path, files: list[str]) -> None:
    """Copy `files` where they differ, and drop sources that are gone; results in the workspace stay."""
    keep = {"params.yaml", "dvc.lock", "reports/metrics.json"}
    listing = workspace / ".dvc" / "tmp" / "sources"
    before = set(listing.read_text().splitlines()) if listing.is_file() else set()
    for name in before - set(files) - keep:
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
    """No git in the workspace; the checkout's cache, and its page for plots where set-up has written it."""
    lines = ["[core]", "no_scm = true", "[cache]", f"dir = {root / '.dvc' / 'cache'}"]
    page = root / ".dvc" / "plots" / "page.html"
    if page.is_file():
        lines += ["[plots]", f"html_template = {page}"]
    (workspace / ".dvc" / "config.local").write_text("\n".join(lines) + "\n")


def _merge(values, overrides) -> None:
    """Override nested values in place (tasks.settings.params refuses keys that nobody knows).

    Names of budgets, sources and the like are data: sections that only hold them are replaced whole.
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
        print(prepare(parser.parse_args().profile))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
