"""Writes the report as one HTML file that loads nothing else. It fills the template report.html."""

import base64
import json
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import jinja2

from tasks.reporting import charts, tables, vega
from tasks.reporting.charts import Figure
from tasks.reporting.columns import Column
from tasks.settings.load import FILE
from tasks.settings.schema import Params

TITLE = "A family of nested language models"
TEMPLATE = Path(__file__).parent / "report.html"
CODE = ("tasks", "elastic_core", "params.yaml", "profiles", "requirements.lock")  # what decides results


def render(
    settings: Params,
    scores: tables.Scores,
    frame,
    described: dict[str, Column],
    figures: dict[str, list[Figure]],
    findings: list[dict],
    note: str,
) -> str:
    """The page. `frame` holds the results, `described` their columns, `findings` the summary at the top."""
    groups = [tables.records(rows) for _, rows in frame.groupby("budget", sort=False)]
    content = {
        "title": TITLE,
        "findings": findings,
        "parent": scores["parent"]["parent"],
        "columns": described,
        "groups": groups,
        "final": {"parent", tables.LABELS[tables.FINAL]},
        "chance": tables.chance(scores),
        "untrained": list(settings.untrained),
        "note": note,
        "sections": {name: [draw(figure) for figure in group] for name, group in figures.items()},
        "seed": settings.seed,
        "provenance": provenance(scores),
        "params": Path(FILE).read_text(),
    }
    template = jinja2.Template(TEMPLATE.read_text(), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return template.render(content) + "\n"


def provenance(scores: tables.Scores) -> dict[str, str]:
    """Versions of the code and of packages, and devices. There is no date, so the same inputs give the same report."""
    environments = {
        json.dumps(values["environment"]): values["environment"]
        for found in scores.values()
        for values in found.values()
    }
    found = {"package": f"nemotron-elastic {version('nemotron-elastic')}"}
    if code := commit():
        found["code"] = f"commit {code}, the last one that changed the pipeline"
    for environment in environments.values():
        device = f"{environment['device']}, {environment['cores']} cores"
        versions = ", ".join(f"{name} {environment[name]}" for name in ("python", "torch", "transformers", "lm_eval"))
        found[f"evaluated on {device}"] = versions
    return found


def commit() -> str | None:
    """The last commit that changed the pipeline's code, and whether files differ from it. None outside of git."""
    if shutil.which("git") is None:
        return None

    def git(*arguments: str, cwd: str | None = None) -> str:
        done = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    top = git("rev-parse", "--show-toplevel")
    if not top or not (found := git("log", "-1", "--format=%h", "--", *CODE, cwd=top)):
        return None
    changed = git("status", "--porcelain", "--", *CODE, cwd=top)
    return found + (" (with changes that are not committed)" if changed else "")


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
