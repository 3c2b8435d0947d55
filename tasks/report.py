"""Stage `report`: what a run has come to, as one HTML file that needs nothing else, as Markdown, and as data.

The numbers are in tasks/reporting/tables.py, their names and units in tasks/reporting/columns.py, the pictures in tasks/reporting/figures.py and
tasks/reporting/charts.py, the page in tasks/reporting/page.py and tasks/report.html.
"""

import base64
import json
from pathlib import Path

from elastic_core.io import storage
from tasks.parents import targets
from tasks.reporting import charts, columns, figures, page, predictions, tables, vega
from tasks.reporting.charts import Figure
from tasks.runtime.exit_status import errors_as_text
from tasks.settings import params

OUT = Path("reports")
NOTE = (
    "Every row is an extracted directory, loaded by transformers. Gap closed: the share of the loss between zero-shot "
    "slice and parent that training won back. Time × parent: against the parent in the same process, turn by turn. "
    "Tasks: the number is steps or pairs; chains_direct answers without worked steps, as a control."
)


def findings(frame) -> list[dict]:
    """What a reader wants to know first of every budget: its share, and what it loses and saves beside the parent."""
    rows = tables.records(tables.finals(frame))
    parent = rows[0]
    return [
        {
            "budget": row["budget"],
            "share": row["share"],
            "loss": row["loss"] - parent["loss"],
            "gap_closed": row["gap_closed"],
            "latency_ratio": row["latency_ratio"],
            "memory": row["memory_mib"] / parent["memory_mib"],
        }
        for row in rows[1:]
    ]


def sentence(finding: dict) -> str:
    """A finding in words."""
    text = f"{finding['budget']}: {finding['share']:.0%} of the parameters, {finding['loss']:+.3f} nats from the parent"
    text += f", {finding['latency_ratio']:.2f} × its time per token, {finding['memory']:.0%} of its memory"
    if finding["gap_closed"] is not None:
        text += f"; {finding['gap_closed']:.0%} of the loss between its zero-shot slice and the parent won back"
    return text


def uneven(scores: tables.Scores) -> list[str]:
    """What members whose widths differ between layers gain over even widths of the same cost, in words."""
    found = []
    for budget, versions in scores.items():
        zero_shot = versions.get("zero_shot", {})
        if even := zero_shot.get("even"):
            gain = even["loss"] - zero_shot["loss"]
            found.append(
                f"{budget}: before training, {zero_shot['loss']:.4f} nats/token with widths that differ between "
                f"layers, {even['loss']:.4f} with even ones of the same cost: {'a gain' if gain > 0 else 'a loss'} "
                f"of {abs(gain):.4f}."
            )
    return found


def table(frame, described: dict, chance: dict[str, float]) -> list[dict]:
    """The results as plain rows with the same keys in each, numbers rounded; in the end what guessing scores."""
    rows = []
    for record in tables.records(frame):
        row = {"budget": record["budget"], "model": record["model"]}
        for name, column in described.items():
            row[column.title] = column.round(record[name])
        rows.append(row)
    if chance:
        guesses = {described[task].title: round(value, 3) for task, value in chance.items()}
        rows.append(dict.fromkeys(rows[0]) | {"budget": "–", "model": "guessing"} | guesses)
    return rows


def as_markdown(rows: list[dict]) -> str:
    """The table; a dash where a column does not apply."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        texts = [
            "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()
        ]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def as_png(figure: Figure) -> str:
    """A figure for Markdown, whose reader may be light or dark."""
    png = vega.to_png(figure.spec(charts.PAPER))
    return "data:image/png;base64," + base64.b64encode(png).decode()


def as_text(settings: "params.Params", rows: list[dict], found: list[dict], note: str, described, pictures) -> str:
    """The report in Markdown. What `make run` prints of it is above the plots."""
    sentences = "".join(f"- {sentence(finding)}\n" for finding in found)
    plots = "".join(
        f"\n### {figure.title}\n\n{figure.caption}\n\n![{figure.title}]({as_png(figure)})\n"
        for group in pictures.values()
        for figure in group
    )
    how = "".join(f"- **{column.title}**: {column.how}\n" for column in described.values())
    return (
        f"# {settings.report.title}\n\n{sentences}\n{as_markdown(rows)}\n\n{note}\n\n## Plots\n{plots}\n"
        f"## How each number was measured\n\n{how}"
    )


@errors_as_text()
def main() -> None:
    settings = params.load()
    config = tables.parent_config()
    scores = tables.read_scores(targets.resolve_served(settings, config))
    frame, described = tables.results(scores), columns.describe(settings, scores)
    comparable = targets.resolve_comparable(settings, config)
    frame = frame.assign(**predictions.columns(scores, config, settings.metric, comparable))
    rows, found = table(frame, described, tables.chance(scores)), findings(frame)
    pictures, note = figures.sections(settings, scores, frame), NOTE
    if settings.untrained:
        note += f" Served without having been trained: {', '.join(settings.untrained)}."
    note += predictions.note(settings.metric)
    tasks = [name for name in described if f"{name}_error" in frame]
    note = " ".join([note, *uneven(scores)])
    storage.write_text(OUT / "report.html", page.render(settings, scores, frame, described, pictures, found, note))
    storage.write_text(OUT / "report.md", as_text(settings, rows, found, note, described, pictures))
    storage.write_text(OUT / "results.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    storage.write_text(OUT / "metrics.json", json.dumps(tables.metrics(frame, tasks), indent=1) + "\n")
    write_plots(frame, scores)


def write_plots(frame, scores: tables.Scores) -> None:
    """The data of the plots, for `dvc plots`."""
    config = tables.parent_config()
    costs = ["ms_per_token", "latency_ratio", "weight_mib", "cache_mib"]
    plots = {
        "training": tables.training(),
        "results": frame[["budget", "model", "parameters", "loss", "kl_to_parent", *costs]],
        "router": tables.router(scores, config),
        "importance": tables.importance(config),
    }
    for name, data in plots.items():
        text = data.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        storage.write_text(OUT / "plots" / f"{name}.csv", text)


if __name__ == "__main__":
    main()
