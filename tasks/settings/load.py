"""Reads params.yaml strictly, and checks the local paths in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from elastic_core.config import ConfigError
from elastic_core.config import load as load_section
from tasks.settings.local_checks import check_local_paths
from tasks.settings.replaced import check_replaced
from tasks.settings.schema import Params
from tasks.settings.yaml_files import read_yaml

FILE = "params.yaml"


def read(values: Mapping, where: str) -> Params:
    """The checked parameters of a file that is already parsed. Opens no file.

    `where` is the start of every error message, such as the file's name. Raises ConfigError.
    """
    check_replaced(values, where)
    return load_section(Params, values, where)


def load(path: str | Path = FILE) -> Params:
    """Read a parameter file. Check its values and the local paths in it.

    Raises ConfigError, which names the parameter to change. This function does not check URLs
    (`tasks.settings.remote_checks` does) or whether the parent can give the budgets (`tasks.runtime.preflight` does).
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"{path.resolve()}: does not exist; run from the top directory of a checkout or of a workspace"
        )
    params = read(read_yaml(path), str(path))
    check_local_paths(params, str(path))
    return params
