"""Checks benchmarks before anything runs: options of answers, and a user's task files for lm-eval.

Of task files, it checks names, groups, tags, data files and modules. It needs no lm-eval. What only lm-eval can tell is
checked in tasks/evaluation/lm_eval_tasks.py.

A task file defines a task, or a group of tasks. A task may carry tags, and a tag names all tasks that carry it.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from elastic_core.config import ConfigError, Require


def _is_number(value, least: float, most: float = float("inf")) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def _are_texts(value) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, (list, tuple)) and all(isinstance(text, str) and text for text in texts)


GENERATION = {  # what `gen_kwargs` may have: name → (whether a value is allowed, the text for the message)
    "max_gen_toks": (lambda value: type(value) is int and value >= 1, "most tokens of an answer, 1 or more"),
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "temperature": (lambda value: _is_number(value, 0), "0 (always the most likely token) or more"),
    "top_p": (lambda value: _is_number(value, 0, 1) and value > 0, "above 0, up to 1"),
    "top_k": (lambda value: type(value) is int and value >= 0, "0 (all tokens) or more"),
    "min_p": (lambda value: _is_number(value, 0, 1), "0 to 1"),
    "repetition_penalty": (lambda value: _is_number(value, 0) and value > 0, "above 0"),
    "until": (_are_texts, "a text or a list of texts that end an answer, in place of those of the task"),
}


def check_answer_options(section, require: Require) -> None:
    """Check how section `evaluate.benchmarks` has prompts written, and answers generated and read."""
    template, end = section.apply_chat_template, section.think_end_token
    require(template != "", "apply_chat_template", template, "true, false, or the name of a chat template")
    require("" not in section.stop, "stop", section.stop, "texts that are not empty")
    for name in () if template else ("fewshot_as_multiturn", "enable_thinking"):
        value = getattr(section, name)
        require(value is None, name, value, "null, because apply_chat_template is false")
    text = "the text that ends thinking, such as </think>"
    if template and section.enable_thinking:
        require(end is not None, "think_end_token", end, f"{text}, because enable_thinking is true")
    require(end != "", "think_end_token", end, f"{text}, or null")
    for name, value in section.gen_kwargs.items():
        if require(name in GENERATION, "gen_kwargs", name, ", ".join(GENERATION)):
            is_allowed, allowed = GENERATION[name]
            require(is_allowed(value), f"gen_kwargs.{name}", value, allowed)
    if section.gen_kwargs.get("do_sample") is True:
        value = section.gen_kwargs.get("temperature")
        require(value not in (None, 0), "gen_kwargs.temperature", value, "above 0, because do_sample is true")


class Function(str):
    """The value of `!function` in a task file: a module beside the file and a function in it, as `utils.score`."""


class _TaskLoader(yaml.SafeLoader):
    pass


_TaskLoader.add_constructor("!function", lambda loader, node: Function(loader.construct_scalar(node)))


def read_task_file(path: Path) -> Any:
    """The content of a task file of lm-eval, read by PyYAML as lm-eval does. Values of `!function` are a `Function`.

    Raises ConfigError with the file's name for a file that is not valid YAML or not UTF-8.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_TaskLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None


@dataclass(frozen=True)
class TaskFile:
    """A task or group: the file that defines it, the files that this one includes, and the values of all of them."""

    name: str
    path: Path
    included: tuple[Path, ...]
    values: dict


class TaskFiles:
    """All task files in a directory: `tasks` and `groups` by name, and `tags`: tag → names of its tasks.

    `problems` are the files that lm-eval skips without a word because they cannot be read.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.tasks: dict[str, TaskFile] = {}
        self.groups: dict[str, TaskFile] = {}
        self.tags: dict[str, list[str]] = {}
        self.problems: list[str] = []
        for path in sorted(directory.rglob("*.yaml")):
            try:
                self._add(path, *_read(path))
            except ConfigError as error:
                self.problems.append(" ".join(str(error).split()))

    def _add(self, path: Path, values: dict, included: tuple[Path, ...]) -> None:
        if "group" in values and "class" not in values:
            self.groups.setdefault(str(values["group"]), TaskFile(str(values["group"]), path, included, values))
        elif "task" in values and str(values["task"]) not in self.tasks:
            name = str(values["task"])
            self.tasks[name] = TaskFile(name, path, included, values)
            for tag in _as_list(values.get("tag")):
                self.tags.setdefault(tag, []).append(name)

    @property
    def names(self) -> list[str]:
        """Everything that can be asked for, sorted."""
        return sorted({*self.tasks, *self.groups, *self.tags})

    def leaves(self, name: str) -> Iterator[TaskFile]:
        """The tasks that a task, group or tag stands for. Raises ConfigError for a group with an unknown member."""
        if name in self.groups:
            yield from self._members(self.groups[name], self.groups[name].values, (name,))
        elif name in self.tasks:
            yield self.tasks[name]
        else:
            yield from (self.tasks[task] for task in self.tags[name])

    def _members(self, group: TaskFile, values: dict, outer: tuple[str, ...]) -> Iterator[TaskFile]:
        """The tasks of a group. `values`: of the group, or of a group inside it; `outer`: the names of all of these."""
        members = values.get("task")
        if not isinstance(members, list) or not members:
            raise ConfigError(f"{group.path}: group {outer[-1]} has no list `task` of its tasks")
        for member in members:
            given = member if isinstance(member, dict) else {"task": member}
            name = str(given.get("group", given.get("task")))
            if name in outer:
                raise ConfigError(f"{group.path}: group {name} contains itself")
            if "group" in given and name not in self.groups:
                yield from self._members(group, given, (*outer, name))
            elif name in self.groups:
                yield from self._members(self.groups[name], self.groups[name].values, (*outer, name))
            elif name in self.tasks or name in self.tags:
                for leaf in self.leaves(name):
                    own = given if name in self.tasks else {}
                    yield TaskFile(leaf.name, leaf.path, leaf.included, leaf.values | own)
            elif len(given) > 1:  # a task that is defined inside the group
                yield TaskFile(f"{outer[-1]}::{name}", group.path, group.included, given)
            else:
                raise ConfigError(
                    f"{group.path}: group {outer[-1]} names {name}, which no file in {self.directory} defines"
                )


def check_task_files(directory: Path, tasks: tuple[str, ...], data_root: Path, where: str) -> list[TaskFile]:
    """Check the files of `tasks`, and return all single tasks that these stand for.

    Raises ConfigError, with the file's name, for unknown names, a task that would be scored twice, missing data files,
    and `!function` modules or packages that are missing. `where` is the start of messages.
    """
    files, owners, found = TaskFiles(directory), {}, []
    for name in tasks:
        if name not in files.names:
            allowed = f"{', '.join(files.names)} (files in {directory})"
            skipped = f"; not readable: {'; '.join(files.problems[:3])}" if files.problems else ""
            raise ConfigError(f"{where}.tasks: got {name!r}; allowed: {allowed}{skipped}")
        for leaf in files.leaves(name):
            if leaf.name in owners and owners[leaf.name] != name:
                raise ConfigError(
                    f"{where}.tasks: {leaf.name} is in {owners[leaf.name]} and in {name}; allowed: every task once"
                )
            owners[leaf.name] = name
            _check_data(leaf, data_root)
            for path in (leaf.path, *leaf.included):
                _check_functions(path)
            found.append(leaf)
    return found


def data_files(leaf: TaskFile) -> list[str]:
    """The data files that a task names: paths or patterns, relative to `evaluate.benchmarks.data_root`, or URLs."""
    options = leaf.values.get("dataset_kwargs")
    files = options.get("data_files") if isinstance(options, dict) else None
    return [name for split in (files.values() if isinstance(files, dict) else [files]) for name in _as_list(split)]


def data_places(leaf: TaskFile, data_root: Path) -> list[str]:
    """All data on this machine that a task reads: `data_files`, and local directories in two other fields."""
    options = leaf.values.get("dataset_kwargs")
    directories = [leaf.values.get("dataset_path"), options.get("data_dir") if isinstance(options, dict) else None]
    local = [name for name in directories if isinstance(name, str) and (data_root / name).exists()]
    return [*data_files(leaf), *local]


def _check_data(leaf: TaskFile, data_root: Path) -> None:
    for name in data_files(leaf):
        is_pattern = any(character in name for character in "*?[")
        if "://" in name or (any(data_root.glob(name)) if is_pattern else (data_root / name).is_file()):
            continue
        raise ConfigError(
            f"{leaf.path}: the data file {name} of task {leaf.name} does not exist in {data_root.resolve()}; "
            "data_files are relative to evaluate.benchmarks.data_root"
        )


def _check_functions(path: Path) -> None:
    """Raise ConfigError if a module of `!function` in a task file, or a package that the module imports, is missing."""
    for function in _functions(read_task_file(path)):
        module = function.rpartition(".")[0]
        code = path.parent / f"{module.replace('.', '/')}.py"
        if not code.is_file():
            if not module or not _is_found(module.split(".")[0]):
                raise ConfigError(f"{path}: !function {function}: there is no {code.name} beside the file")
            continue
        try:
            tree = ast.parse(code.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError) as error:
            raise ConfigError(f"{code}: not valid Python: {error}") from None
        for package in _packages(tree):
            if not _is_found(package):
                raise ConfigError(f"{code}: needs the package {package}, which is not installed: pip install {package}")


def _packages(tree: ast.Module) -> Iterator[str]:
    """The packages that a module imports in any case; not those that it tries to import."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def _is_found(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _functions(value) -> Iterator[Function]:
    if isinstance(value, Function):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _functions(part)


def _read(path: Path, outer: tuple[Path, ...] = ()) -> tuple[dict, tuple[Path, ...]]:
    """(The values of a task file and of the files that it includes; its own count, the paths of these files)."""
    if path in outer:
        raise ConfigError(f"{path}: includes itself")
    if not path.is_file():
        raise ConfigError(f"{outer[-1]}: includes {path}, which does not exist")
    values = read_task_file(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no task, but {type(values).__name__}")
    merged, included = {}, ()
    for name in _as_list(values.pop("include", None)):
        others, deeper = _read(path.parent / name, (*outer, path))
        merged, included = merged | others, (*included, path.parent / name, *deeper)
    return merged | values, included


def _as_list(value) -> list[str]:
    return [] if value is None else [str(item) for item in value] if isinstance(value, list) else [str(value)]
