"""Where a profile runs: `default` in the checkout itself, any other in a copy under .runs/, with its own results.

`python -m tasks.workspace PROFILE` prepares it and prints its directory. A profile is a file in profiles/ that
overrides values of params.yaml; the copy shares the checkout's DVC cache.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

from elastic_core.config import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def prepare(profile: str = "default", root: Path = ROOT) -> Path:
    """The directory in which `profile` runs, brought up to date with the checkout's tracked and new files."""
    if profile == "default":
        return root
    names = sorted(path.stem for path in (root / "profiles").glob("*.yaml"))
    if profile not in names:
        raise ConfigError(f"profile: got {profile!r}; allowed: {', '.join(['default', *names])} (files in profiles/)")
    overrides = root / "profiles" / f"{profile}.yaml"
    workspace = root / ".runs" / profile
    files = [name for name in _source_files(root) if (root / name).is_file()]
    _mirror(root, workspace, files)
    yaml = YAML()  # keeps the comments
    parameters = yaml.load(root / "params.yaml")
    _merge(parameters, yaml.load(overrides) or {})
    yaml.dump(parameters, workspace / "params.yaml")
    (workspace / ".dvc" / "config.local").write_text(
        f"[core]\n    no_scm = true\n[cache]\n    dir = {root / '.dvc' / 'cache'}\n"
    )
    return workspace


def _source_files(root: Path) -> list[str]:
    """Files that git tracks or would track, relative to `root`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name]


def _mirror(root: Path, workspace: Path, files: list[str]) -> None:
    """Copy `files` where they differ, and drop sources that are gone; results in the workspace stay."""
    keep = {"params.yaml", "dvc.lock"}
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


def _merge(values, overrides) -> None:
    """Override nested values in place (tasks.params refuses keys that nobody knows).

    Names of budgets, sources and the like are data: sections that only hold them are replaced whole.
    """
    replaced = {"budgets", "budget_shares", "mixture", "sources", "loss_by_budget", "path"}
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
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
