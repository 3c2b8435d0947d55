"""Writes the report as Markdown, for the dashboard."""

import base64

from tasks.reporting import charts, vega
from tasks.reporting.charts import Figure
from tasks.reporting.columns import Column
from tasks.reporting.findings import sentence
from tasks.reporting.page import TITLE


def render(
    rows: list[dict], found: list[dict], note: str, described: dict[str, Column], figures: dict[str, list[Figure]]
) -> str:
    """The report: findings, table, charts, and how each number was measured.

    rows: the table, see `tables.rounded`. found: see `findings.find`. described: name → column.
    """
    sentences = "".join(f"- {sentence(finding)}\n" for finding in found)
    plots = "".join(
        f"\n### {figure.title}\n\n{figure.caption}\n\n![{figure.title}]({as_png(figure)})\n"
        for group in figures.values()
        for figure in group
    )
    how = "".join(f"- **{column.title}**: {column.how}\n" for column in described.values())
    return (
        f"# {TITLE}\n\n{sentences}\n{as_table(rows)}\n\n{note}\n\n## Plots\n{plots}\n"
        f"## How each number was measured\n\n{how}"
    )


def as_table(rows: list[dict]) -> str:
    """The results as a Markdown table. A dash marks a missing value."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        texts = [
            "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()
        ]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def as_png(figure: Figure) -> str:
    """A chart as a data: URL, on a white ground because the page that shows it may be light or dark."""
    png = vega.to_png(figure.spec(charts.PAPER))
    return "data:image/png;base64," + base64.b64encode(png).decode()
