"""What differs between two finished runs, in parameters and in results. It needs no Prefect."""

import json
from pathlib import Path

from flows.records import read_record

COLUMNS = ("what", "name", "before", "after", "change")


def changes(before: Path, after: Path) -> list[dict]:
    """A row for everything that differs between two runs' directories, the same keys in each."""
    rows = []
    for kind, read in (("run", _provenance), ("parameter", _parameters), ("result", _results)):
        old, new = read(before), read(after)
        for name in [*old, *(name for name in new if name not in old)]:
            if old.get(name) != new.get(name):
                rows.append(_row(kind, name, old.get(name), new.get(name)))
    return rows or [_row("–", "nothing differs", None, None)]


def count(rows: list[dict]) -> str:
    """How much differs, in words."""
    numbers = {kind: sum(row["what"] == kind for row in rows) for kind in ("parameter", "result")}
    parts = [f"{number} {kind}{'s' * (number != 1)}" for kind, number in numbers.items() if number]
    return f"{' and '.join(parts)} differ" if parts else "no parameter and no result differs"


def as_text(rows: list[dict]) -> str:
    """The rows as a table for a terminal."""
    cells = [COLUMNS, *(tuple(_short(row[name]) for name in COLUMNS) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _row(kind: str, name: str, old, new) -> dict:
    both = [isinstance(value, int | float) and not isinstance(value, bool) for value in (old, new)]
    change = f"{new - old:+.4g}" if all(both) else "–"
    return {"what": kind, "name": name, "before": _shown(old), "after": _shown(new), "change": change}


def _shown(value):
    if value is None:
        return "–"
    return value if isinstance(value, int | float | str) else json.dumps(value)


def _provenance(directory: Path) -> dict:
    record = read_record(directory)
    return {name: record[name] for name in ("profile", "commit")}


def _parameters(directory: Path) -> dict:
    from ruamel.yaml import YAML

    return _flat(YAML(typ="safe").load(directory / "params.yaml"))


def _flat(values: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _results(directory: Path) -> dict:
    """Every number of the results table, by the text of its row and its column."""
    found = {}
    for row in json.loads((directory / "results.json").read_text()):
        words = " ".join(str(value) for value in row.values() if isinstance(value, str))
        found |= {f"{words}: {name}": value for name, value in row.items() if not isinstance(value, str)}
    return found
