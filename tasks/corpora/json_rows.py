"""Reads rows from JSON text: an object per line, or one array of objects, of which one item at a time is in memory.

Both use Python's own parser. The streaming parser ijson would need no code here, but it replaces half of a surrogate
pair by "?" without an error, refuses the NaN that Python itself writes, and names no line.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import TextIO

from elastic_core.errors import UserError

Row = tuple[str, object]  # (place, such as "a.jsonl, line 3"; value: text, None, or what the user has to correct)

Field = str | tuple[str, ...]  # the field to read; or fields that may occur once only, to read the whole object

_BLOCK = 1 << 20  # characters of an array that are read at once
_SPACE = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_LONGEST_CUT = 12  # characters of a token other than a string that may be missing its end: \uXXXX\uXXXX


def read_lines(file: TextIO, path: str, field: Field, hint: str = "") -> Iterator[Row]:
    """Yield (place, value of `field`) for each line of a JSON Lines file; "" for an empty line.

    With a tuple as `field`, the value is the object of the line.

    Raises UserError, which names the line, for a line that is not an object with this field. `hint` ends the message
    for a line that is not JSON.
    """
    decode = json.JSONDecoder().decode  # less work per line than json.loads
    for number, line in enumerate(file, start=1):
        place = f"{path}, line {number}"
        if line.isspace():
            yield place, ""
            continue
        try:
            record = decode(line)
        except json.JSONDecodeError as error:
            # Files that were joined have a mark in the middle, which nobody sees in an editor.
            problem = "byte-order mark" if line.startswith("\ufeff") else error.msg
            raise UserError(f"{place}: not valid JSON ({problem} at column {error.colno}){hint}") from None
        except (ValueError, RecursionError) as error:
            raise _unreadable(place, error) from None
        yield place, _value(record, line, field, place)


def read_array(file: TextIO, path: str, field: Field) -> Iterator[Row]:
    """Yield (place, value of `field`) for each object of an array; the object itself with a tuple as `field`.

    Raises UserError, which names line and item, if the array is damaged, incomplete or followed by anything, or if an
    item is not an object with this field.
    """
    array = _Array(file)
    array.take("[", path)
    if array.next_character() == "]":
        array.take("]", path)
    else:
        number, separator = 0, ","
        while separator == ",":
            number += 1
            array.next_character()
            place = f"{path}, line {array.line}, item {number}"
            record, source = array.item(path, number)
            yield place, _value(record, source, field, place)
            separator = array.take(",]", path)
    if array.next_character():
        raise UserError(f"{path}, line {array.line}: not valid JSON (text after the end of the array)")


def find_field(record, field: str, place: str, parameter: str = "text_field"):
    """The value of `field`: a name in `record`, or else names in nested objects, joined by dots; None inside a null.

    `parameter`: what the user has to change, if there is no such field.
    Raises UserError, which names `place`, for a record that is not an object and for a missing field.
    """
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected an object, got {type(record).__name__}")
    if field in record:
        return record[field]
    value = record
    for name in field.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or name not in value:
            raise UserError(f"{place}: no field {field!r} (fields: {quoted(nested_names(record))}); set {parameter}")
        value = value[name]
    return value


def nested_names(record: dict) -> Iterator[str]:
    """The names of all fields, those of nested objects joined by dots."""
    for name, value in record.items():
        if isinstance(value, dict) and value:
            yield from (f"{name}.{inner}" for inner in nested_names(value))
        else:
            yield name


def quoted(names: Iterator[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


class _Array:
    """The text of an array from `at` on. What stands before has been parsed; more is read from `file` when needed."""

    def __init__(self, file: TextIO):
        self.line = 1  # of the character at `at`
        self._file, self._decoder, self._text, self._at = file, json.JSONDecoder(), "", 0

    def next_character(self) -> str:
        """Skip white space and return the character behind it, or "" at the end."""
        while True:
            self._move(_SPACE.match(self._text, self._at).end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def take(self, allowed: str, path: str) -> str:
        """Skip white space and one of the `allowed` characters, and return that."""
        found = self.next_character()
        if not found or found not in allowed:
            expected, got = " or ".join(map(repr, allowed)), repr(found) if found else "the end of the file"
            raise UserError(f"{path}, line {self.line}: not valid JSON (expected {expected}, got {got})")
        self._move(self._at + 1)
        return found

    def item(self, path: str, number: int) -> tuple[object, str]:
        """Parse the item at `at`; return it and its source."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._is_cut(error.pos) and self._read_more():
                    continue
                line = self.line + self._text.count("\n", self._at, error.pos)
                raise UserError(f"{path}, line {line}, item {number}: not valid JSON ({error.msg})") from None
            except (ValueError, RecursionError) as error:
                raise _unreadable(f"{path}, line {self.line}, item {number}", error) from None
            source = self._text[self._at : end]
            self._move(end)
            return value, source

    def _is_cut(self, position: int) -> bool:
        """Whether the parser may have failed at `position` only because the rest of the item is not read yet."""
        if position >= len(self._text) - _LONGEST_CUT:
            return True
        return self._text[position] == '"' and _STRING.match(self._text, position) is None

    def _move(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _read_more(self) -> bool:
        """Forget what was parsed, and read at least as much as is left, so that a long item is parsed a few times only.

        False at the end of the file.
        """
        left = len(self._text) - self._at
        more = self._file.read(max(_BLOCK, left))
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)


def _value(record, source: str, field: Field, place: str):
    """The value of `field` in a record, which was parsed from `source`. Raises UserError for a field that occurs twice.

    Python's parser keeps the last of two fields with one name, so a text would be lost. Parsing with a check of all
    objects is slow; it is done only if the name stands twice in `source`. The value that was kept stands behind the
    last name and is at least as long as its text: the search stops that much before the end, and so is short.
    """
    if isinstance(field, tuple):
        names = [name for name in field if "." in name or name in record] if isinstance(record, dict) else []
        if any(source.count(f'"{name.rpartition(".")[2]}"') > 1 for name in names):
            parts = {part for name in names for part in (name, *name.split("."))}
            json.loads(source, object_pairs_hook=_check_of_names(parts, place))
        return record
    if isinstance(record, dict) and field in record:
        name, value = field, record[field]
    else:
        name, value = field.rpartition(".")[2], find_field(record, field, place)
    end = len(source) - (len(value) if isinstance(value, str) else 0)
    if source.count(f'"{name}"', 0, end) > 1:
        json.loads(source, object_pairs_hook=_check_of_names({field, *field.split(".")}, place))
    return value


def _check_of_names(names: set[str], place: str) -> Callable[[list[tuple[str, object]]], dict]:
    """A function that makes an object of its fields. It raises UserError if one of `names` occurs twice."""

    def as_dict(pairs: list[tuple[str, object]]) -> dict:
        found = [name for name, _ in pairs]
        for name in names:
            if found.count(name) > 1:
                raise UserError(f"{place}: the field {name!r} occurs twice in one object")
        return dict(pairs)

    return as_dict


def _unreadable(place: str, error: Exception) -> UserError:
    """The error for JSON with an integer of too many digits, or nested too deep for Python's parser."""
    return UserError(f"{place}: JSON that cannot be read ({error})")
