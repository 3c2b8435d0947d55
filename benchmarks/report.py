"""Rows of a benchmark: what was checked or measured, printed as one table and written as JSON."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from elastic_core.io.atomic import write_text

PASS, FAIL, MEASURED, NOT_MEASURED = "pass", "fail", "measured", "not measured"


@dataclass(frozen=True)
class Row:
    """One line: `result` against `bound`, and how it came out. A measurement has no bound."""

    check: str
    what: str
    result: str
    bound: str
    status: str


def within(check: str, what: str, error: float, bound: float, note: str = "") -> Row:
    """An error that may not exceed its bound; nan fails."""
    return Row(check, what, f"{error:.1e}{note}", f"≤ {bound:.0e}", PASS if error <= bound else FAIL)


def holds(check: str, what: str, true: bool, yes: str = "equal", no: str = "different") -> Row:
    """What has to be so, to the bit."""
    return Row(check, what, yes if true else no, yes, PASS if true else FAIL)


def at_most(check: str, what: str, value: float, bound: float, note: str = "") -> Row:
    """A ratio to the alternative in the same run, which may not exceed its goal; nan fails."""
    return Row(check, what, f"{value:.2f} ×{note}", f"≤ {bound:g} ×", PASS if value <= bound else FAIL)


def at_least(check: str, what: str, value: float, bound: float, note: str = "") -> Row:
    """A ratio to the alternative in the same run, which has to reach its goal; nan fails."""
    return Row(check, what, f"{value:.2f} ×{note}", f"≥ {bound:g} ×", PASS if value >= bound else FAIL)


def measured(check: str, what: str, result: str) -> Row:
    return Row(check, what, result, "–", MEASURED)


def not_measured(check: str, what: str, why: str) -> Row:
    return Row(check, what, why, "–", NOT_MEASURED)


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [("check", "what", "result", "bound", ""), *((r.check, r.what, r.result, r.bound, r.status) for r in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def write(path: Path, environment: dict, rows: list[Row]) -> None:
    """Write environment and rows as JSON, complete or not at all."""
    content = {"environment": environment, "rows": [asdict(row) for row in rows]}
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
