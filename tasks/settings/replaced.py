"""Parameters and values that older versions had. The error message says what replaced them."""

from __future__ import annotations

from collections.abc import Mapping

from elastic_core.config import ConfigError

KEYS = {  # path of an old parameter → what the user has to do
    "report": "remove the section: the report's title is fixed",
    "rank.top_channels": "remove it: half of the Mamba channels score the heads",
    "train_short.budgets_per_batch": "remove it: every microbatch reads its own sequences",
    "train_extended.budgets_per_batch": "remove it: every microbatch reads its own sequences",
    "parent.training.budgets_per_batch": "remove it: every microbatch reads its own sequences",
}
VALUES = {("rank.measure", "written"): "output_norm"}  # (path, old value) → new value


def check_replaced(values: Mapping, where: str) -> None:
    """Raise ConfigError for a parameter or a value that no longer exists, and say what replaced it.

    `values` is the parsed file; `where` is the start of the error message.
    """
    for path, advice in KEYS.items():
        if _find(values, path):
            raise ConfigError(f"{where}.{path}: no longer a parameter; {advice}")
    for (path, old), new in VALUES.items():
        if _find(values, path) == [old]:
            raise ConfigError(f"{where}.{path}: got {old!r}, which is now called {new!r}")


def _find(values, path: str) -> list:
    """The value at a dotted path, in a list of one. An empty list if there is no such key: null is a value too."""
    for key in path.split("."):
        if not isinstance(values, Mapping) or key not in values:
            return []
        values = values[key]
    return [values]
