"""Reading JSON files that users copy or edit."""

import json
import math

from elastic_core.errors import UserError
from elastic_core.io import storage
from elastic_core.io.filesystem import Location, is_url

ADVICE = "copy or write the file again"
MOST_LEVELS = 100  # of lists and objects in each other; libraries copy them by recursion, which Python limits
LARGEST_INTEGER, LARGEST_FLOAT = (1 << 63) - 1, (2 - 2**-23) * 2.0**127  # of int64 and of float32
_NAMES = {
    **{dict: "an object ({…})", list: "a list", str: "a text", bool: "true or false", type(None): "null"},
    **{int: "an integer", float: "a finite number"},
}


def read_json(path: Location, name: Location | None = None, shape=dict):
    """The content of a JSON file, local or at a URL.

    - `name`: the file's name in error messages, if it is a local copy of another.
    - `shape`: what the content has to be, see `check_shape`.

    Raises UserError for a damaged file, and for JSON of another shape.
    """
    return parse_json(read_content(path), name or path, shape)


def read_content(path: Location) -> bytes:
    """The bytes of a JSON file, local or at a URL."""
    if is_url(path):
        return storage.read_bytes(path)
    with open(path, "rb") as file:
        return file.read()


def parse_json(data: bytes, name: Location, shape=dict):
    """As `read_json`, with the bytes of a file."""
    if not data.strip():
        raise UserError(f"{name}: is empty; {ADVICE}")
    try:
        content = json.loads(data.decode("utf-8"))
        if b"\\u" in data:  # half a character, such as \ud800, can be written so; it fails later, as a name or a text
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, UnicodeEncodeError
        raise UserError(f"{name}: is not valid JSON ({error}); {ADVICE}") from None
    except RecursionError:
        raise UserError(f"{name}: is not valid JSON (nested too deeply); {ADVICE}") from None
    if _levels(content) > MOST_LEVELS:
        raise UserError(f"{name}: is nested too deeply; allowed: {MOST_LEVELS} levels; {ADVICE}")
    check_shape(content, shape, name)
    return content


def check_numbers(content, name: Location) -> None:
    """Raise UserError, which starts with `name`, for a number that no tensor can hold, at any depth.

    Integers have to fit into int64 and numbers with a fraction into float32. Infinity and NaN are accepted.
    """
    left = [("", content)]
    while left:
        place, value = left.pop()
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        left += [(f"{place}.{key}".strip("."), part) for key, part in parts]
        if isinstance(value, float) and math.isfinite(value) and abs(value) > LARGEST_FLOAT:
            raise UserError(f"{name}: {place}={value}; allowed: up to {LARGEST_FLOAT:.2g}, which float32 can hold")
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            raise UserError(f"{name}: {place} is an integer of {value.bit_length()} bits; allowed: 63 bits and a sign")


def _levels(content) -> int:
    """How deep lists and objects are nested; counts up to one more than `MOST_LEVELS`."""
    levels, level = 0, [content]
    while levels <= MOST_LEVELS and (level := [value for value in level if isinstance(value, (dict, list))]):
        levels += 1
        level = [part for value in level for part in (value.values() if isinstance(value, dict) else value)]
    return levels


def check_shape(value, shape, name: Location) -> None:
    """Raise UserError, which starts with `name`, unless a JSON value has a shape. A shape is written as one of these:

    - a type: dict, list, str, bool, int, float (any finite number), type(None) or object (any value)
    - [shape]: a list of such values
    - {"key": shape, "other?": shape, ...}: an object with at least these keys; one with "?" may be missing
    - {str: shape}: an object with any keys
    - a tuple of shapes, of which one has to fit
    """
    if (problem := _problem(value, shape, "")) is not None:
        raise UserError(f"{name}: {problem}; {ADVICE}")


def _problem(value, shape, place: str) -> str | None:
    """What does not fit the shape, or None. `place` is where the value stands in the file: ``budgets.small``."""
    if isinstance(shape, tuple):
        problems = [_problem(value, one, place) for one in shape]
        return None if None in problems else "; or ".join(problems)
    kind = shape if isinstance(shape, type) else type(shape)
    if not _is(value, kind):
        given = f"the number {value}" if isinstance(value, float) else f"a JSON {type(value).__name__}"
        return f"{place} holds {given}; expected {_NAMES[kind]}".strip()
    if isinstance(shape, list):
        parts = [(item, shape[0], f"{place}[{i}]") for i, item in enumerate(value)]
    elif isinstance(shape, dict):
        wanted = dict.fromkeys(value, shape[str]) if str in shape else shape
        if missing := [name for name in wanted if name not in value and not name.endswith("?")]:
            return f"{place} has no {missing[0]!r}; expected {', '.join(map(repr, wanted))}".strip()
        inner = {name.removesuffix("?") if wanted is shape else name: part for name, part in wanted.items()}
        parts = [(value[name], part, f"{place}.{name}".strip(".")) for name, part in inner.items() if name in value]
    else:
        return None
    return next((problem for part in parts if (problem := _problem(*part)) is not None), None)


def _is(value, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e300  # no NaN
    if kind is list:  # also values that were not read from a file
        return isinstance(value, (list, tuple))
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))
