"""Reads params.yaml strictly, and checks the local paths in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from elastic_core.config import ConfigError, Problems, load_fields
from tasks.settings.cross_checks import CHECKS
from tasks.settings.local_checks import OF_EVERY_STAGE, check_local
from tasks.settings.replaced import take_replaced
from tasks.settings.schema import SECTIONS, Params
from tasks.settings.yaml_files import read_mapping

FILE = "params.yaml"


def read(values: Mapping, where: str = FILE) -> Params:
    """The checked parameters of a file that is already parsed. Opens no file.

    `where` is the start of every problem, such as the file's name. Raises ConfigError with all problems.
    """
    problems = Problems()
    sections = read_sections(problems, values)
    raise_problems(problems, where)
    return Params(**vars(sections)).completed()


def load(path: str | Path = FILE) -> Params:
    """Read a parameter file. Check its values and those local paths in it that are used in more than one stage.

    Raises ConfigError with all problems, which names the parameters to change. The rest is checked before a run, see
    `tasks.commands.check`.
    """
    return check_values(read_file(path), str(path), OF_EVERY_STAGE)


def read_file(path: str | Path = FILE) -> Mapping:
    """The content of a parameter file, not yet checked. Raises ConfigError."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"{path.resolve()}: does not exist; run from the top directory of a checkout or of a workspace"
        )
    values = read_mapping(path, str(path))
    if not values:
        raise ConfigError(f"{path}: is empty; allowed: sections with keys")
    return values


def check_values(values: Mapping, where: str, local_checks) -> Params:
    """The parameters of a parsed file, after its values and `local_checks` of local_checks.py have been checked.

    Raises ConfigError with the problems of both.
    """
    problems = Problems()
    sections = read_sections(problems, values)
    check_local(problems, sections, local_checks)
    raise_problems(problems, where)
    return Params(**vars(sections)).completed()


def read_sections(problems: Problems, values: Mapping) -> SimpleNamespace:
    """The sections of a parsed file as attributes; without those that are missing or have a value of the wrong type.

    Adds to `problems`. Each starts with its parameter, such as ``train_short.steps``.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{FILE}: got {values!r}; allowed: a section with keys")
    values = take_replaced(problems, values, "")
    sections = SimpleNamespace(**load_fields(problems, Params, _without_unused(values), ""))
    for check, needed in CHECKS.items():
        if all(hasattr(sections, name) for name in needed):
            with problems.collecting():
                check(sections, problems.require)
    return sections


def raise_problems(problems: Problems, where: str) -> None:
    """Raise ConfigError with all problems, in the order of the sections. `where` is put before each."""
    if problems.found:
        found = sorted(problems.found, key=_section_index)
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in found))


def is_sound(problems: Problems, sections: SimpleNamespace, *keys: str) -> bool:
    """Whether the parameters `keys`, such as ``parent.path``, could be read and nothing in `problems` concerns them.

    A check that needs them is left out otherwise: it would say the same again in other words.
    """
    wrong = [re.match(r"[\w.]*", problem)[0].split(".") for problem in problems.found]
    needed = [key.split(".") for key in keys]
    return all(hasattr(sections, path[0]) for path in needed) and not any(
        path[: len(other)] == other[: len(path)] for path in needed for other in wrong
    )


def _section_index(problem: str) -> int:
    section = re.match(r"\w*", problem)[0]
    return SECTIONS.index(section) if section in SECTIONS else -1


def _without_unused(values: Mapping) -> Mapping:
    """The values without those that nothing uses: how a parent is trained that is not trained here."""
    parent = values.get("parent")
    if isinstance(parent, Mapping) and parent.get("path") is not None:
        unused = ("model", "training")
        return {**values, "parent": {key: value for key, value in parent.items() if key not in unused}}
    return values
