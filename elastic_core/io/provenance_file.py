"""The file of a model directory that says where its weights come from: ``{"stages": [a record per stage]}``."""

import os
import shutil
from pathlib import Path

from elastic_core.errors import UserError
from elastic_core.io.json_files import read_json

FILE = "provenance.json"


def read_provenance(directory: str | os.PathLike) -> list[dict]:
    """The records of a directory, of the first stage first; [] without a file. Raises UserError for a damaged file."""
    path = Path(directory) / FILE
    if not path.is_file():
        return []
    records = read_json(path).get("stages")
    if not isinstance(records, list) or not all(isinstance(record, dict) and "stage" in record for record in records):
        raise UserError(f"{path}: has no list `stages` of records with the field `stage`; copy the file again")
    return records


def copy_provenance(source: str | os.PathLike, directory: str | os.PathLike) -> None:
    """Copy the file from one model directory to another, if there is one."""
    if (Path(source) / FILE).is_file():
        shutil.copyfile(Path(source) / FILE, Path(directory) / FILE)
