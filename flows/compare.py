"""The Prefect flow `compare`: what differs between two finished runs, in parameters and in results."""

import json
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_table_artifact

from elastic_core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
NAMED = Path("reports/runs")  # a directory for every finished run, see flows/publish.py
RECORD = "run.json"


@flow(name="compare")
def compare(before: str = "", after: str = "") -> None:
    """Show a table of the differences between two finished runs of the flow `elastic`: parameters and results.

    Args:
        before: The name of a finished run; empty: the last one before the other.
        after: The name of a finished run; empty: the last one.
    """
    before, after = choose(records(ROOT), before or None, after or None)
    create_table_artifact(
        key="comparison",
        table=changes(ROOT / NAMED / before, ROOT / NAMED / after),
        description=f"From run `{before}` to run `{after}`",
    )


def choose(names: list[str], before: str | None, after: str | None) -> tuple[str, str]:
    """The two runs to compare, of `names` in the order in which they finished."""
    for name in filter(None, (before, after)):
        if name not in names:
            raise UserError(f"run: got {name!r}; allowed: {', '.join(names) or 'none has finished yet'} ({NAMED}/)")
    after = after or next((name for name in reversed(names) if name != before), None)
    earlier = names[: names.index(after)] if after else []
    before = before or next(reversed(earlier), None)
    if before is None or after is None:
        raise UserError(f"comparing takes two finished runs, of which {NAMED}/ has {len(names)}: {', '.join(names)}")
    return before, after


def records(root: Path) -> list[str]:
    """Names of the finished runs, in the order in which they finished."""
    found = [path.parent for path in (root / NAMED).glob(f"*/{RECORD}")]
    return [path.name for path in sorted(found, key=lambda path: (read_record(path)["finished"], path.name))]


def read_record(directory: Path) -> dict:
    """The record of a finished run: its name, profile, commit, parameters, …"""
    return json.loads((directory / RECORD).read_text())


def changes(before: Path, after: Path) -> list[dict]:
    """A row for everything that differs between two runs' directories, the same keys in each."""
    rows = []
    for kind, read in (("run", _provenance), ("parameter", _parameters), ("result", _results)):
        old, new = read(before), read(after)
        for name in [*old, *(name for name in new if name not in old)]:
            if old.get(name) != new.get(name):
                rows.append(_row(kind, name, old.get(name), new.get(name)))
    return rows or [_row("–", "nothing differs", None, None)]


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
