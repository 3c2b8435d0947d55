"""Strict, typed configuration: a plain mapping (one section of params.yaml) becomes a frozen dataclass.

The dataclasses stand in the files that use them. This file only fills them. Unknown keys, missing keys and values of
the wrong type raise ConfigError. The text names the key, the value that was given and the values that are allowed, one
line for each problem.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping

from elastic_core.errors import UserError

_TYPE_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
SECTION = "a section with keys"

# (condition, key, given, allowed) → condition. `require` is one; `Problems.require` collects instead of raising.
Require = Callable[[bool, str, object, str], bool]


class ConfigError(UserError):
    """Configuration values that the user has to change. The text has a line for each; a line starts with its key."""

    @property
    def problems(self) -> list[str]:
        """The lines of the text."""
        return str(self).split("\n")


class Problems:
    """Collects the problems of many parameters, so that the user sees all of them at once."""

    def __init__(self):
        self.found: list[str] = []

    def add(self, *problems: str) -> None:
        """Add problems that are not yet there."""
        self.found += [problem for problem in problems if problem not in self.found]

    def require(self, condition: bool, key: str, given, allowed: str) -> bool:
        """Like the function `require`, but collects the problem. Returns `condition`."""
        if not condition:
            self.add(describe(key, given, allowed))
        return condition

    @contextlib.contextmanager
    def collecting(self, prefix: str = "") -> Iterator[None]:
        """Collect a ConfigError that is raised inside. `prefix` is put before each of its problems."""
        try:
            yield
        except ConfigError as error:
            self.add(*(prefix + problem for problem in error.problems))

    def raise_all(self) -> None:
        """Raise ConfigError with all problems, if there are any."""
        if self.found:
            raise ConfigError("\n".join(self.found))


def require(condition: bool, key: str, given, allowed: str) -> bool:
    """Raise ConfigError unless `condition`: "key: got X; allowed: Y". Returns True otherwise."""
    if not condition:
        raise ConfigError(describe(key, given, allowed))
    return True


def check_shares(name: str, shares: dict[str, float], require: Require) -> None:
    """Check shares of sources or budgets; none at all are equal shares."""
    valid = all(share >= 0 for share in shares.values()) and (not shares or sum(shares.values()) > 0)
    require(valid, name, shares, "shares of 0 or more, not all 0")


def describe(key: str, given, allowed: str) -> str:
    """The text of a problem, in one line."""
    return f"{key}: got {given!r}; allowed: {allowed}"


def load(cls, values: Mapping, where: str):
    """Build the dataclass `cls` from `values`.

    `where` tells the user what to edit, such as ``params.yaml: train_short``. It starts every problem.
    Raises ConfigError with all problems: unknown keys, missing keys, and values of the wrong type. A dataclass may have
    a method ``check(require=require)``, which calls `require` for values that do not fit together. It is called last,
    if all values have the right type, and its problems are collected too.
    """
    problems, config = Problems(), None
    with contextlib.suppress(_Unusable):
        config = _load(problems, cls, values, where)
    problems.raise_all()
    return config


def load_fields(problems: Problems, cls, values: Mapping, prefix: str) -> dict:
    """The values of the fields of `cls`, with defaults, without those that are missing or have the wrong type.

    Problems are added to `problems`, each with its key after `prefix`.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints, found = _type_hints(cls), {}
    for key in values:
        if key not in fields:
            similar = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {similar[0]!r}?" if similar else "."
            problems.add(f"{prefix}{key}: unknown parameter{hint} Allowed: {', '.join(fields)}")
    for name, field in fields.items():
        if name in values:
            with contextlib.suppress(_Unusable):
                found[name] = _convert(problems, hints[name], values[name], f"{prefix}{name}")
        elif field.default is not dataclasses.MISSING:
            found[name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[name] = field.default_factory()
        else:
            problems.add(f"{prefix}{name}: missing; it has no default and must be set")
    return found


_type_hints = functools.cache(typing.get_type_hints)


class _Unusable(Exception):
    """A value could not be converted. Its problem has been collected."""


def _load(problems: Problems, cls, values, where: str):
    if not isinstance(values, Mapping):
        _refuse(problems, where, values, SECTION)
    found = load_fields(problems, cls, values, f"{where}.")
    if len(found) < len(dataclasses.fields(cls)):
        raise _Unusable
    config = cls(**found)
    if hasattr(config, "check"):
        own = Problems()
        with own.collecting():
            config.check(own.require)
        problems.add(*(f"{where}.{problem}" for problem in own.found))
    return config


def _refuse(problems: Problems, where: str, given, allowed: str) -> typing.NoReturn:
    problems.add(describe(where, given, allowed))
    raise _Unusable


def _convert(problems: Problems, hint, value, where: str):
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _load(problems, hint, value, where)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(problems, arguments, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            _refuse(problems, where, value, ", ".join(map(repr, arguments)))
        return value
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            _refuse(problems, where, value, "a list")
        items = [_attempt(problems, arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
        return tuple(_all_usable(items))
    if origin is dict:
        if not isinstance(value, Mapping):
            _refuse(problems, where, value, SECTION)
        keys = [_attempt(problems, arguments[0], key, where) for key in value]
        items = [_attempt(problems, arguments[1], item, f"{where}.{key}") for key, item in value.items()]
        return dict(zip(_all_usable(keys), _all_usable(items), strict=True))
    return _convert_plain(problems, hint, value, where)


def _attempt(problems: Problems, hint, value, where: str):
    """Like `_convert`, but returns the class `_Unusable` instead of raising it."""
    try:
        return _convert(problems, hint, value, where)
    except _Unusable:
        return _Unusable


def _all_usable(items: list) -> list:
    if _Unusable in items:
        raise _Unusable
    return items


def _convert_plain(problems: Problems, hint, value, where: str):
    # bool is a subclass of int in Python: true must not count as 1.
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1023 else math.inf
    if hint is typing.Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        if isinstance(value, float) and not math.isfinite(value):
            _refuse(problems, where, value, "a finite number")
        return value
    allowed = _TYPE_NAMES.get(hint, hint.__name__)
    _refuse(
        problems,
        where,
        value,
        f"{allowed}, without quotes" if hint in (int, float) and _reads_as(hint, value) else allowed,
    )


def _reads_as(hint, value) -> bool:
    """Whether a value is the text of a number."""
    try:
        return isinstance(value, str) and hint(value) is not None
    except ValueError:
        return False


def _convert_union(problems: Problems, options, value, where: str):
    if value is None and type(None) in options:
        return None
    options = [option for option in options if option is not type(None)]
    if len(options) == 1:
        return _convert(problems, options[0], value, where)
    found = []
    for option in options:
        tried = Problems()
        try:
            return _convert(tried, option, value, where)
        except _Unusable:
            found += tried.found
    problems.add("; or ".join(found))
    raise _Unusable
