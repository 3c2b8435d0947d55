"""Reading JSON files that users copy or edit."""

import json
import os
from pathlib import Path

from elastic_core.errors import UserError


def read_json(path: str | os.PathLike, name: str | os.PathLike | None = None):
    """The content of a JSON file. Raises UserError for a damaged file.

    name: the file's name in error messages, if it is a local copy of another.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise UserError(f"{name or path}: is not valid JSON ({error}); copy or write the file again") from None
