"""The file of a model directory that says where its weights come from: ``{"stages": [a record per stage]}``."""

import os
import shutil
from pathlib import Path

from elastic_core.io.json_files import read_json

FILE = "provenance.json"
RECORD = {
    **{"stage": str, "key": str, "commit": (str, type(None)), "clean": bool},
    **{
        "parameters": dict,
        "libraries": dict,
        "files": dict,
        "fingerprints": dict,
        "started": str,
        "seconds": float,
        "device": str,
    },
    **{"tokens?": int, "continues?": {"run": str, "changed": [str]}},
}


def read_provenance(directory: str | os.PathLike) -> list[dict]:
    """The records of a directory, of the first stage first; [] without a file. Raises UserError for a damaged file."""
    path = Path(directory) / FILE
    return read_json(path, shape={"stages": [RECORD]})["stages"] if path.is_file() else []


def copy_provenance(source: str | os.PathLike, directory: str | os.PathLike) -> None:
    """Copy the file from one model directory to another, if there is one."""
    if (Path(source) / FILE).is_file():
        shutil.copyfile(Path(source) / FILE, Path(directory) / FILE)
