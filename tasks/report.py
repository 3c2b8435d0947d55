"""Stage `report`: write the results of a run as a self-contained HTML file, as Markdown and as data files.

In tasks/reporting: tables.py computes the numbers, columns.py has their names and units, figures.py and charts.py make
the figures, findings.py the summary, samples.py the sample generations, provenance.py says where all of it comes from,
page.py writes the HTML and markdown.py the Markdown.
"""

import json
from pathlib import Path

from elastic_core.io.atomic import write_text
from tasks.parents import targets
from tasks.reporting import columns, figures, findings, markdown, page, predictions, provenance, samples, tables
from tasks.settings.load import load

OUT = Path("reports")


def main() -> None:
    settings = load()
    config, metric = tables.parent_config(), targets.metric_of_family(settings)
    scores = tables.read_scores(targets.resolve_served(settings, config))
    frame, described = tables.results(scores), columns.describe(settings, scores)
    comparable = targets.resolve_comparable(settings, config)
    frame = frame.assign(**predictions.columns(scores, config, metric, comparable))
    table = tables.once_per_budget(frame, [name for name, column in described.items() if column.once])
    rows = tables.rounded(table, described, tables.chance(scores))
    found = findings.find(frame, findings.targets(settings, scores, config, metric))
    pictures, note = figures.sections(settings, scores, frame), findings.note(settings, scores, metric)
    rest = samples.prompts(scores), provenance.collect(settings, scores, config)
    write_text(OUT / "report.html", page.render(settings, scores, table, described, pictures, found, note, *rest))
    write_text(OUT / "report.md", markdown.render(rows, found, note, described, pictures, *rest))
    write_text(OUT / "results.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    tasks = [name for name in described if f"{name}_error" in frame]
    write_text(OUT / "metrics.json", json.dumps(tables.metrics(frame, tasks), indent=1) + "\n")
    write_plots(frame, scores, config)


def write_plots(frame, scores: tables.Scores, config) -> None:
    """Write the CSV files of the plots that `dvc plots` shows."""
    costs = ["latency_ratio", "latency_ratio_low", "latency_ratio_high", "weight_mib", "cache_mib"]
    plots = {
        "training": tables.training(),
        "results": frame[["budget", "model", "parameters", "loss", "kl_to_parent", *costs]],
        "router": tables.router(scores, config),
        "importance": tables.importance(config),
    }
    for name, data in plots.items():
        text = data.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        write_text(OUT / "plots" / f"{name}.csv", text)
