"""What differs between two finished runs, or between two model directories. It needs no Prefect."""

import json
from collections.abc import Callable
from pathlib import Path

from elastic_core.errors import UserError
from flows.records import read_json, read_record
from flows.tables import aligned
from tasks.settings.yaml_files import read_mapping

FIELDS = {"parameter": "parameters", "library": "libraries", "code or input": "files", "fingerprint": "fingerprints"}
COLUMNS = ("what", "name", "before", "after", "change")


def changes(before: Path, after: Path) -> list[dict]:
    """A row for everything that differs between two runs' directories, the same keys in each."""
    return _compare({"run": _provenance, "parameter": _parameters, "result": _results}, before, after)


def model_changes(before: dict, after: dict) -> list[dict]:
    """The same for two model directories, from what `elastic inspect` describes: sizes, and where they come from."""
    readers = {"size": _sizes, "stage": _stages}
    readers |= {kind: _of_stages(field) for kind, field in FIELDS.items()}
    return _compare(readers, before, after)


def _compare(readers: dict[str, Callable[..., dict]], before, after) -> list[dict]:
    rows = []
    for kind, read in readers.items():
        old, new = read(before), read(after)
        for name in [*old, *(name for name in new if name not in old)]:
            if old.get(name) != new.get(name):
                rows.append(_row(kind, name, old.get(name), new.get(name)))
    return rows or [_row("–", "nothing differs", None, None)]


def count(rows: list[dict]) -> str:
    """How much differs, in words."""
    plurals = {"size": "sizes", "parameter": "parameters", "library": "libraries", "result": "results"}
    numbers = {kind: (sum(row["what"] == kind for row in rows), plural) for kind, plural in plurals.items()}
    numbers["other entry"] = sum(row["what"] not in (*plurals, "–") for row in rows), "other entries"
    parts = [f"{number} {plural if number != 1 else kind}" for kind, (number, plural) in numbers.items() if number]
    return f"{' and '.join(parts)} differ" if parts else "nothing differs"


def as_text(rows: list[dict]) -> str:
    """The rows as a table for a terminal."""
    return aligned([COLUMNS, *(tuple(_short(row[name]) for name in COLUMNS) for row in rows)])


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _row(kind: str, name: str, old, new) -> dict:
    return {"what": kind, "name": name, "before": _shown(old), "after": _shown(new), "change": _change(old, new)}


def _change(old, new) -> str:
    """By how much two numbers differ; a dash for other values and for integers that are too large for a float."""
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in (old, new)):
        return "–"
    try:
        return f"{new - old:+.4g}"
    except OverflowError:
        return "–"


def _shown(value):
    if value is None:
        return "–"
    return value if isinstance(value, int | float | str) else json.dumps(value)


def _provenance(directory: Path) -> dict:
    record = read_record(directory)
    return {name: record[name] for name in ("profile", "commit")}


def _parameters(directory: Path) -> dict:
    path = directory / "params.yaml"
    return _flat(read_mapping(path, str(path)))


def _flat(values: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _sizes(description: dict) -> dict:
    names = ("model_type", "parameters", "pattern", "bytes", "dtypes", "vocab_size", "context")
    return {name: description[name] for name in names} | _flat(description["widths"])


def _stages(description: dict) -> dict:
    """Commit, device, time and tokens of each stage."""
    names = ("key", "commit", "clean", "started", "seconds", "tokens", "device", "continues")
    records = description["provenance"]
    return {f"{record['stage']}.{name}": record[name] for record in records for name in names if name in record}


def _of_stages(field: str) -> Callable[[dict], dict]:
    """Reads one field of all stages' records."""

    def read(description: dict) -> dict:
        found = {}
        for record in description["provenance"]:
            found |= _flat(record.get(field, {}), f"{record['stage']}: ")
        return found

    return read


def _results(directory: Path) -> dict:
    """Every number of the results table, by the text of its row and its column."""
    found = {}
    path = directory / "results.json"
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: is not a list of rows; remove {directory}")
    for row in rows:
        words = " ".join(str(value) for value in row.values() if isinstance(value, str))
        found |= {f"{words}: {name}": value for name, value in row.items() if not isinstance(value, str)}
    return found
