"""Reading params.yaml: strictly, and with what it names on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from elastic_core.config import ConfigError
from elastic_core.config import load as load_section
from tasks.settings.local_checks import check_local_paths
from tasks.settings.replaced import check_replaced
from tasks.settings.schema import Params

FILE = "params.yaml"


def read(values: Mapping, where: str) -> Params:
    """Check the values of a parameter file. `where` starts every error. Looks at no file."""
    check_replaced(values, where)
    return load_section(Params, values, where)


def load(path: str | Path = FILE) -> Params:
    """Read and check a parameter file and the local paths in it. Raises ConfigError naming what to change and where.

    Whether a parent can give the budgets is checked by tasks.runtime.preflight, what lies behind URLs by
    tasks.settings.remote_checks.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path.resolve()}: not there; run from the top of a checkout or of a workspace")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    params = read(values, str(path))
    check_local_paths(params, str(path))
    return params
