"""Checkouts of which a test needs a few files only."""

import subprocess
from collections.abc import Mapping
from pathlib import Path


def write_checkout(root: Path, files: Mapping[str, str]) -> Path:
    """A git repository with these files, name → content. Nothing is committed."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", "-q", root], check=True)
    return root
