"""Reading JSON files that users copy or edit."""

import json

from elastic_core.errors import UserError
from elastic_core.io import storage
from elastic_core.io.filesystem import Location, is_url


def read_json(path: Location, name: Location | None = None) -> dict:
    """The content of a JSON file, local or at a URL, which has to be an object ({…}).

    name: the file's name in error messages, if it is a local copy of another.
    Raises UserError for a damaged file, and for JSON of another type.
    """
    name = name or path
    if is_url(path):
        data = storage.read_bytes(path)
    else:
        with open(path, "rb") as file:
            data = file.read()
    if not data.strip():
        raise UserError(f"{name}: is empty; copy or write the file again")
    try:
        content = json.loads(data.decode("utf-8"))
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise UserError(f"{name}: is not valid JSON ({error}); copy or write the file again") from None
    except RecursionError:
        raise UserError(f"{name}: is not valid JSON (nested too deeply); copy or write the file again") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{name}: holds a JSON {kind}; expected an object ({{…}}); copy or write the file again")
    return content
