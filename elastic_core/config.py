"""Strict, typed configuration: a plain mapping (one section of params.yaml) becomes a frozen dataclass.

The dataclasses stand in the files that use them. This file only fills them. Unknown keys, missing keys and values of
the wrong type raise ConfigError. The text names the key, the value that was given and the values that are allowed.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping

from elastic_core.errors import UserError

_TYPE_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null"}


class ConfigError(UserError):
    """A configuration value that the user has to change; the text starts with its key."""


def load(cls, values: Mapping, where: str):
    """Build the dataclass `cls` from `values`.

    `where` tells the user what to edit, such as ``params.yaml: train_short``. It starts every error message.
    Raises ConfigError for an unknown key, a missing key, or a value of the wrong type. If the dataclass has a method
    `check()`, it is called last; it raises ConfigError for values that do not fit together.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a section with keys, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            similar = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {similar[0]!r}?" if similar else "."
            raise ConfigError(f"{where}.{key}: unknown parameter{hint} Allowed: {', '.join(fields)}")
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}.{name}: missing; it has no default and must be set")
    config = cls(**arguments)
    if hasattr(config, "check"):
        try:
            config.check()
        except ConfigError as error:
            raise ConfigError(f"{where}.{error}") from None
    return config


def require(condition: bool, key: str, given, allowed: str) -> None:
    """Raise ConfigError unless `condition`: "key: got X; allowed: Y". Made for `check()` methods."""
    if not condition:
        raise ConfigError(f"{key}: got {given!r}; allowed: {allowed}")


def _convert(hint, value, where: str):
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return load(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{where}: got {value!r}; allowed: {', '.join(map(repr, arguments))}")
        return value
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a section with keys, got {value!r}")
        return {
            _convert(arguments[0], key, where): _convert(arguments[1], item, f"{where}.{key}")
            for key, item in value.items()
        }
    # bool is a subclass of int in Python: true must not count as 1.
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is typing.Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}: expected a finite number, got {value!r}")
        return value
    note = " (YAML reads 1e-3 as text; write 1.0e-3)" if hint is float and isinstance(value, str) else ""
    raise ConfigError(f"{where}: expected {_TYPE_NAMES.get(hint, hint.__name__)}, got {value!r}{note}")


def _convert_union(options, value, where: str):
    if value is None and type(None) in options:
        return None
    problems = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _convert(option, value, where)
        except ConfigError as error:
            problems.append(str(error))
    raise ConfigError("; or ".join(problems))
