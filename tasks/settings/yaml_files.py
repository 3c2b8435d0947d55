"""Reads params.yaml and profiles. What cannot be read is named with its line and column."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from elastic_core.config import SECTION, ConfigError

MOST_LEVELS, MOST_VALUES = 50, 100_000  # of a file


def read_mapping(path: Path, name: str, keep_comments: bool = False) -> Mapping:
    """The content of a YAML file: sections with keys. An empty file is an empty mapping.

    `name` is the file's name in error messages. With `keep_comments` the result can be changed and written again with
    its comments. Raises ConfigError for a file that cannot be read, holds no YAML, or holds something else.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise ConfigError(f"{name}, line {line}, column {column}: not valid UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror})") from None
    values = parse(text, name, keep_comments)
    if values is None:
        return YAML().map() if keep_comments else {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name}: got {type_name(values)}; allowed: {SECTION}, such as `seed: 0`")
    return values


def parse(text: str, name: str, keep_comments: bool = False):
    """The value of a YAML text. Raises ConfigError, which starts with `name`, line and column."""
    try:
        _check_size(text, name)
        return YAML(typ="rt" if keep_comments else "safe").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{name}{place}: not valid YAML: {_reason(error, text)}") from None
    except ConfigError:
        raise
    except (YAMLError, ValueError) as error:  # such as a control character, or the date 2026-13-01
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None


def _check_size(text: str, name: str) -> None:
    """Raise ConfigError for a text with too many levels or values.

    A short text can name itself, or name its parts again and again, and so stand for values that fill the memory.
    """
    nodes: list[list] = [[None, 0]]  # the collections around the current place: name (&anchor), number of values
    sizes: dict[str, int] = {}
    for event in YAML(typ="safe").parse(text):
        match event:
            case SequenceStartEvent() | MappingStartEvent():
                nodes.append([event.anchor, 1])
            case SequenceEndEvent() | MappingEndEvent():
                anchor, size = nodes.pop()
                sizes[anchor] = size
                nodes[-1][1] += size
            case ScalarEvent():
                sizes[event.anchor] = 1
                nodes[-1][1] += 1
            case AliasEvent():
                if event.anchor in (anchor for anchor, _ in nodes):
                    raise ConfigError(f"{name}: *{event.anchor} stands inside of &{event.anchor}; write the value out")
                nodes[-1][1] += sizes.get(event.anchor, 1)
        if len(nodes) > MOST_LEVELS or nodes[-1][1] > MOST_VALUES:
            raise ConfigError(f"{name}: too large; allowed: {MOST_LEVELS} levels of nesting and {MOST_VALUES:,} values")


def type_name(value) -> str:
    """The YAML name of a value's type, for error messages."""
    return "a list" if isinstance(value, (list, tuple)) else repr(value)


def _reason(error: MarkedYAMLError, text: str) -> str:
    problem = " ".join(str(error.problem or error.context).split())
    lines = text.splitlines()
    if error.problem_mark and error.problem_mark.line < len(lines):
        line = lines[error.problem_mark.line]
        if "\t" in line[: len(line) - len(line.lstrip())]:
            return f"{problem}; indent with spaces, not with tabs"
    if problem.startswith("found duplicate key"):
        return f"{problem.split(' with value')[0]}; keep one of them"
    return problem
