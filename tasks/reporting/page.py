"""Writes the report as one HTML file that loads nothing else. It fills the template report.html."""

import base64
import re
from pathlib import Path

import jinja2

from tasks.reporting import charts, tables, vega
from tasks.reporting.charts import Figure
from tasks.reporting.columns import Column
from tasks.reporting.findings import target_text
from tasks.reporting.provenance import Provenance
from tasks.reporting.samples import Prompt
from tasks.settings.load import FILE
from tasks.settings.schema import Params

TITLE = "A family of nested language models"
TEMPLATE = Path(__file__).parent / "report.html"


def render(
    settings: Params,
    scores: tables.Scores,
    frame,
    described: dict[str, Column],
    figures: dict[str, list[Figure]],
    findings: list[dict],
    note: str,
    prompts: list[Prompt],
    origin: Provenance,
) -> str:
    """The page. `frame` holds the results, `described` their columns, `findings` the summary at the top."""
    groups = [tables.records(rows) for _, rows in frame.groupby("budget", sort=False)]
    content = {
        "title": TITLE,
        "findings": findings,
        "target_text": target_text,
        "parent": scores["parent"]["parent"],
        "columns": {name: column for name, column in described.items() if column.shown},
        "groups": groups,
        "final": {"parent", tables.LABELS[tables.FINAL]},
        "chance": tables.chance(scores),
        "untrained": list(settings.untrained),
        "note": note,
        "sections": {name: [draw(figure) for figure in group] for name, group in figures.items()},
        "seed": settings.seed,
        "prompts": prompts,
        "origin": origin,
        "params": Path(FILE).read_text(),
    }
    template = jinja2.Template(TEMPLATE.read_text(), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return template.render(content) + "\n"


def draw(figure: Figure) -> dict:
    """A chart in both themes, as data: URLs, with its size in pixels."""
    svgs = {name: vega.to_svg(figure.spec(theme)) for name, theme in (("light", charts.LIGHT), ("dark", charts.DARK))}
    width, height = (round(float(n)) for n in re.search(r'width="([\d.]+)" height="([\d.]+)"', svgs["light"]).groups())
    urls = {name: "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode() for name, svg in svgs.items()}
    return {
        "title": figure.title,
        "caption": figure.caption,
        "wide": figure.wide,
        "width": width,
        "height": height,
    } | urls
