"""Writes the report as Markdown, for the dashboard."""

import base64
import re

from tasks.reporting import charts, vega
from tasks.reporting.charts import Figure
from tasks.reporting.columns import Column
from tasks.reporting.findings import sentence
from tasks.reporting.page import TITLE
from tasks.reporting.provenance import Provenance
from tasks.reporting.samples import Prompt


def render(
    rows: list[dict],
    found: list[dict],
    note: str,
    described: dict[str, Column],
    figures: dict[str, list[Figure]],
    prompts: list[Prompt],
    origin: Provenance,
) -> str:
    """The report: findings, table, charts, samples, how each number was measured, and where it comes from.

    rows: the table, see `tables.rounded`. found: see `findings.find`. described: name → column.
    """
    sentences = "".join(f"- {sentence(finding)}\n" for finding in found)
    plots = "".join(
        f"\n### {figure.title}\n\n{figure.caption}\n\n![{figure.title}]({as_png(figure)})\n"
        for group in figures.values()
        for figure in group
    )
    how = "".join(f"- **{column.title}**: {column.how}\n" for column in described.values() if column.shown)
    return (
        f"# {TITLE}\n\n{sentences}\n{as_table(rows, described)}\n\n{note}\n\n## Plots\n{plots}\n"
        f"## Sample generations\n\n{as_samples(prompts)}\n## How each number was measured\n\n{how}\n"
        f"## Where this comes from\n\n{as_origin(origin)}"
    )


def as_table(rows: list[dict], described: dict[str, Column]) -> str:
    """The results as a Markdown table, without hidden columns. A dash marks a missing value."""
    columns = [column for column in described.values() if column.shown]
    body = []
    for row in rows:
        texts = [row["budget"], row["model"]]
        for column in columns:
            text = _number(row[column.title])
            if column.spread and row[column.title] is not None:
                low, high = (described[name].title for name in column.spread)
                text += f" ({row[low]:.2f}–{row[high]:.2f})"
            texts.append(text)
        body.append(tuple(texts))
    return _table(("budget", "model", *(column.title for column in columns)), body)


def _number(value) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    first, *others = ("| " + " | ".join(line) + " |" for line in (head, *rows))
    return "\n".join([first, "|" + "---|" * len(head), *others])


def as_samples(prompts: list[Prompt]) -> str:
    """Every prompt with its continuations; a line break is shown as ↵."""
    text = "Greedy decoding; members after their last stage. Expected: how the text goes on, or the answer.\n\n"
    for prompt in prompts:
        text += f"**{prompt.source}**: {_code(prompt.text)}\n\n- expected: {_code(prompt.expected)}\n"
        text += "".join(f"- {model}: {_code(words)}\n" for model, words in prompt.continuations.items()) + "\n"
    return text


def _code(text: str) -> str:
    text = text.replace("\n", "↵")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if text else "(nothing)"


def as_origin(origin: Provenance) -> str:
    """Facts as a list, then the tables of data and stages."""
    facts = "".join(f"- **{name}**: {value}\n" for name, value in origin.facts.items() if name != "parameters")
    tables = "".join(f"\n### {table.title}\n\n{_table(table.head, table.rows)}\n" for table in origin.tables)
    return facts + tables


def as_png(figure: Figure) -> str:
    """A chart as a data: URL, on a white ground because the page that shows it may be light or dark."""
    png = vega.to_png(figure.spec(charts.PAPER))
    return "data:image/png;base64," + base64.b64encode(png).decode()
