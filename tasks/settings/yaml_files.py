"""Reads YAML files of users: params.yaml, and lm-eval's task files with their tags `!function`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from elastic_core.config import ConfigError


class Function(str):
    """The value of `!function` in a task file: a module beside the file and a function in it, as `utils.score`."""


class _TaskLoader(yaml.SafeLoader):
    pass


_TaskLoader.add_constructor("!function", lambda loader, node: Function(loader.construct_scalar(node)))


def read_yaml(path: Path, is_task: bool = False) -> Any:
    """The content of a YAML file. With `is_task`, values of `!function` are of type `Function`.

    Raises ConfigError with the file's name for a file that is not valid YAML or not UTF-8.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_TaskLoader if is_task else yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
