"""Checkpoints of a training run: written whole or not at all, verified when read, the last few kept."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import torch

from elastic_core import hf

logger = logging.getLogger(__name__)


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_key(configuration: dict, inputs: list[str | os.PathLike]) -> str:
    """A name for (configuration, contents of the input files and directories): what changes either changes the name.

    A run that is keyed by it never resumes another configuration's checkpoint, and always its own.
    """
    digest = hashlib.sha256(json.dumps(configuration, sort_keys=True, default=str).encode())
    for root in map(Path, inputs):
        if not root.exists():
            raise ValueError(f"{root}: not there; run the stage that makes it first")
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.is_file():
                digest.update(str(path.relative_to(root)).encode() + file_digest(path).encode())
    return digest.hexdigest()[:16]


def save(directory: str | os.PathLike, step: int, state: dict, keep: int = 2) -> None:
    """Write `state` as the checkpoint of `step` beside the others, then drop all but the newest `keep`.

    Those of this step or later ones were passed over as damaged, or the run would stand there: they are dropped.
    """
    directory = Path(directory)
    name = f"step-{step:08d}"
    for damaged in directory.glob("step-*"):
        if damaged.name >= name:
            shutil.rmtree(damaged)
    with hf.whole_directory(directory / name) as partial:
        torch.save(state, partial / "state.pt")
        manifest = {"step": step, "bytes": (partial / "state.pt").stat().st_size}
        manifest["sha256"] = file_digest(partial / "state.pt")
        (partial / "manifest.json").write_text(json.dumps(manifest) + "\n")
    for old in sorted(directory.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def load_newest(directory: str | os.PathLike) -> dict | None:
    """The newest checkpoint that is intact, or None; a damaged one is passed over with a warning."""
    for path in sorted(Path(directory).glob("step-*"), reverse=True):
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            if file_digest(path / "state.pt") == manifest["sha256"]:
                return torch.load(path / "state.pt", weights_only=True)
            problem = "its checksum does not match"
        except (OSError, ValueError, KeyError) as error:
            problem = str(error)
        logger.warning("checkpoint %s is damaged (%s); trying the one before", path, problem)
    return None
