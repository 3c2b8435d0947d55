"""Parameters and values that older versions had. The error message says what replaced them."""

from __future__ import annotations

from collections.abc import Mapping

from elastic_core.config import Problems

KEYS = {  # path of an old parameter → what the user has to do
    "report": "remove the section: the report's title is fixed",
    "rank.top_channels": "remove it: half of the Mamba channels score the heads",
    "train_short.budgets_per_batch": "remove it: every microbatch reads its own sequences",
    "train_extended.budgets_per_batch": "remove it: every microbatch reads its own sequences",
    "parent.training.budgets_per_batch": "remove it: every microbatch reads its own sequences",
}
VALUES = {("rank.measure", "written"): "output_norm"}  # (path, old value) → new value


def take_replaced(problems: Problems, values: Mapping, prefix: str) -> Mapping:
    """Collect a problem for every parameter and value that no longer exists, and say what replaced it.

    `values` is the parsed file; `prefix` is the start of the problems. Returns the values without them.
    """
    for path, advice in KEYS.items():
        if _find(values, path):
            problems.add(f"{prefix}{path}: no longer a parameter; {advice}")
            values = _without(values, path.split("."))
    for (path, old), new in VALUES.items():
        if _find(values, path) == [old]:
            problems.add(f"{prefix}{path}: got {old!r}, which is now called {new!r}")
            values = _without(values, path.split("."))
    return values


def _find(values, path: str) -> list:
    """The value at a dotted path, in a list of one. An empty list if there is no such key: null is a value too."""
    for key in path.split("."):
        if not isinstance(values, Mapping) or key not in values:
            return []
        values = values[key]
    return [values]


def _without(values: Mapping, path: list[str]) -> Mapping:
    """A copy without the key at `path`."""
    first, *rest = path
    if not rest:
        return {key: value for key, value in values.items() if key != first}
    return {**values, first: _without(values[first], rest)}
