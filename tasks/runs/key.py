"""The key of a stage's run: a digest of everything that dvc.yaml lists for the stage.

dvc.yaml lists what decides a stage's result: its inputs, its parameters, its code and the libraries that it uses. DVC
runs a stage again when any of these has changed. The run's key then changes too, so no run goes on from checkpoints
that other code or other inputs have made. `compute` and `tracking` are not listed, because they do not decide results.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from tasks.runs.dvc import dvc_stage

# Format of training checkpoints. It is a part of every run key, so no run finds checkpoints of another format.
FORMAT = 3
PARAMETERS = "params.yaml"


@dataclass(frozen=True)
class Inputs:
    """What dvc.yaml lists for a stage.

    - `parameters`: the values of the listed keys of params.yaml.
    - `libraries`: name → version, of the listed libraries (None: not installed).
    - `files`: path → DVC's checksum (MD5) of its content, for files and directories, code among them.
    """

    parameters: dict
    libraries: dict
    files: dict

    @property
    def key(self) -> str:
        """16 hexadecimal digits. Any change of the inputs changes the key."""
        content = json.dumps([FORMAT, asdict(self)], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def differences(self, other: Inputs) -> list[str]:
        """What differs in `other`, one entry per parameter, library and path: ``train_short.steps: 800, now 900``."""
        found = []
        for ours, theirs in ((self.parameters, other.parameters), (self.libraries, other.libraries)):
            names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            found += [f"{name}: {ours.get(name)}, now {theirs.get(name)}" for name in names]
        paths = self.files.keys() | other.files.keys()
        return found + sorted(path for path in paths if self.files.get(path) != other.files.get(path))


def read_inputs(stage: str) -> Inputs:
    """The inputs of a stage in the working directory as they are now. `stage` is DVC's name of it: ``extract@small``.

    DVC keeps the checksums of unchanged files, so a large directory is read once. Raises FileNotFoundError for an input
    that does not exist.
    """
    with dvc_stage(stage) as entry:
        return _inputs(entry, lambda dep: dep.read_params(), lambda dep: dep.get_hash().value)


def committed_inputs(stage: str) -> Inputs | None:
    """The inputs that the outputs of a stage in dvc.lock were made from; None if DVC's cache has not all of these."""
    with dvc_stage(stage) as entry:
        if any(not out.hash_info or (out.use_cache and out.changed_cache()) for out in entry.outs):
            return None
        if any(not dep.hash_info for dep in entry.deps):
            return None
        return _inputs(entry, lambda dep: dep.hash_info.value, lambda dep: dep.hash_info.value)


def _inputs(entry, values, checksum) -> Inputs:
    parameters, libraries, files = {}, {}, {}
    for dep in entry.deps:
        path = str(dep.def_path)
        if not hasattr(dep, "params"):
            files[path] = checksum(dep)
        elif path == PARAMETERS:
            parameters |= values(dep)
        else:
            libraries |= values(dep)
    return Inputs(parameters, libraries, files)
