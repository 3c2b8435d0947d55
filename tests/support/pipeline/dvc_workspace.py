"""A workspace in which stages can be called in this process: DVC's files, and the code that stages depend on."""

import contextlib
import shutil
from pathlib import Path

from tasks import fingerprint

ROOT = Path(__file__).resolve().parents[3]
FILES = ("dvc.yaml", ".dvcignore", ".dvc/config", "profiles/latency.json")


def make_workspace(directory: Path) -> None:
    """Make `directory` a workspace. Its code is a copy; what runs is the code of the tests."""
    for name in FILES:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, directory / name)
    for name in ("tasks", "elastic_core"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    (directory / ".dvc" / "config.local").write_text("[core]\n    no_scm = true\n")
    with contextlib.chdir(directory):
        fingerprint.write(fingerprint.LIBRARIES, fingerprint.libraries)
