"""Parameters that older versions had: the error says what replaced them."""

from __future__ import annotations

from collections.abc import Mapping

from elastic_core.config import ConfigError

KEYS = {  # path → what to do
    "report": "remove the section: the report's title is fixed",
    "rank.top_channels": "remove it: half of the Mamba channels score the heads",
    "train_short.budgets_per_batch": "remove it: every microbatch reads its own sequences",
    "train_extended.budgets_per_batch": "remove it: every microbatch reads its own sequences",
    "parent.training.budgets_per_batch": "remove it: every microbatch reads its own sequences",
}
VALUES = {("rank.measure", "written"): "output_norm"}  # (path, old value) → new value


def check_replaced(values: Mapping, where: str) -> None:
    """Raise ConfigError for a parameter or a value that is no longer known, with what replaced it."""
    for path, advice in KEYS.items():
        if _find(values, path.split(".")) is not None:
            raise ConfigError(f"{where}.{path}: no longer a parameter; {advice}")
    for (path, old), new in VALUES.items():
        if _find(values, path.split(".")) == old:
            raise ConfigError(f"{where}.{path}: got {old!r}, which is now called {new!r}")


def _find(values, path: list[str]):
    for key in path:
        if not isinstance(values, Mapping) or key not in values:
            return None
        values = values[key]
    return values
