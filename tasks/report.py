"""Stage `report`: one table and the plots, as Markdown and as a self-contained HTML file."""

import base64
import json
import os
from pathlib import Path

import altair as alt
import jinja2
import pandas as pd
import vl_convert

from elastic_core.submodel import WIDTHS
from tasks import params
from tasks.endings import errors_as_text

ARTIFACTS, OUT = Path("artifacts"), Path("reports")
LABELS = {"zero_shot": "zero-shot slice", "short": "after stage 1", "extended": "after stage 2"}
STAGES = ("parent", "train_short", "train_extended")
LEGEND = (
    "Loss and KL(parent ‖ model) in nats per token and bits per byte (bpb) on held-out text. Gap closed: the "
    "share of the loss between zero-shot slice and parent that training won back. Tasks: exact match through "
    "lm-eval on the extracted directories, greedy decoding; the number is steps or pairs; chains_direct is the "
    "control that answers without worked steps. Guessing: 0.1 for chains, the commonest value of the prompt for "
    "recall."
)
SMOOTHING = 40  # plotted points per curve, each the mean of the steps around it


def read_results(budgets: dict[str, float]) -> list[dict]:
    """One row per model, the parent first, every row with the same keys; shares and scores as plain numbers."""
    parent = json.loads((ARTIFACTS / "evaluate" / "parent.json").read_text())["parent"]
    rows = [_row("parent", "parent", parent, parent)]
    for budget, target in sorted(budgets.items(), key=lambda item: -item[1]):
        versions = json.loads((ARTIFACTS / "evaluate" / f"{budget}.json").read_text())
        for version, scores in versions.items():
            if version == "zero_shot" and target == 1.0:
                continue  # the parent itself
            zero_shot = versions["zero_shot"]["loss"]
            rows.append(_row(budget, LABELS[version], scores, parent, zero_shot if target < 1.0 else None))
    chance = {task: round(result["chance"], 3) for task, result in parent["tasks"].items()}
    return [*rows, dict.fromkeys(rows[0]) | {"budget": "–", "model": "guessing"} | chance] if chance else rows


def _row(budget: str, version: str, scores: dict, parent: dict, zero_shot: float | None = None) -> dict:
    gap = None if zero_shot is None else zero_shot - parent["loss"]
    row = {
        "budget": budget,
        "model": version,
        "parameters": scores["num_parameters"],
        "share": round(scores["num_parameters"] / parent["num_parameters"], 4),
        "loss": round(scores["loss"], 4),
        "KL to parent": round(scores["kl_to_parent"], 4),
        "gap closed": None if gap is None else round((zero_shot - scores["loss"]) / gap, 3),
    }
    row |= {name.replace("bits_per_byte_", "bpb "): round(scores[name], 4) for name in scores if "bits_per" in name}
    return row | {task: round(result["exact_match"], 3) for task, result in scores["tasks"].items()}


def training_curves() -> pd.DataFrame:
    """Smoothed training loss per budget against the tokens of each stage."""
    rows = []
    for stage in STAGES:
        name = "parent_metrics.jsonl" if stage == "parent" else f"{stage}/metrics.jsonl"
        for line in (ARTIFACTS / name).read_text().splitlines():
            step = json.loads(line)
            for result in step["microbatches"]:
                budget = "parent" if stage == "parent" else result["budget"]
                rows.append({"stage": stage, "tokens": step["tokens"], "budget": budget, "loss": result["loss"]})
    frame = pd.DataFrame(rows, columns=["stage", "tokens", "budget", "loss"]).astype({"loss": float})  # null: skipped
    if frame.empty:
        return frame
    bins = frame.groupby("stage")["tokens"].transform(lambda tokens: pd.cut(tokens, SMOOTHING, labels=False))
    return frame.groupby(["stage", "budget", bins.rename("bin")], as_index=False).mean(numeric_only=True)


def charts(results: list[dict], budgets: list[str], tasks: list[str]) -> dict[str, alt.Chart]:
    """The plots by title."""
    curves, frame = training_curves(), pd.DataFrame([row for row in results if row["parameters"]])
    order = ["parent", *budgets]
    color = alt.Color("budget:N", sort=order, scale=alt.Scale(scheme="tableau10", domain=order))
    line = (
        alt.Chart(curves)
        .mark_line()
        .encode(
            x=alt.X("tokens:Q", title="tokens of the stage"),
            y=alt.Y("loss:Q", title="training loss, nats per token (stages: KL)", scale=alt.Scale(zero=False)),
            color=color,
        )
    )
    size = (
        alt.Chart(frame)
        .mark_point(filled=True, size=90)
        .encode(
            x=alt.X("parameters:Q", title="parameters", scale=alt.Scale(zero=False)),
            y=alt.Y("loss:Q", title="held-out loss (nats per token)", scale=alt.Scale(zero=False)),
            color=color,
            shape=alt.Shape("model:N", sort=["parent", *LABELS.values()]),
        )
    )
    plots = {
        "Training loss by budget": line.properties(width=230, height=220)
        .facet(column=alt.Column("stage:N", sort=list(STAGES), title=None))
        .resolve_scale(x="independent", y="independent"),
        "Quality against size": size.properties(width=420, height=260),
        "What the router chose": _router_chart(color),
        "Importance, by layer and axis": _importance_chart(),
        "Importance of the layers": _depth_chart(),
    }
    if tasks:
        plots["Reasoning tasks"] = _task_chart(frame, tasks, order)
    return plots


def _task_chart(frame: pd.DataFrame, tasks: list[str], order: list[str]) -> alt.Chart:
    melted = frame.melt(["budget", "model"], tasks, "task", "exact match")
    return (
        alt.Chart(melted)
        .mark_bar()
        .encode(
            x=alt.X("model:N", sort=["parent", *LABELS.values()], title=None),
            y=alt.Y("exact match:Q", scale=alt.Scale(domain=[0, 1])),
            color=alt.Color("model:N", sort=["parent", *LABELS.values()]),
            column=alt.Column("task:N", sort=tasks, title=None),
            row=alt.Row("budget:N", sort=order, title=None),
        )
        .properties(width=80, height=90)
    )


def _router_chart(color: alt.Color) -> alt.Chart:
    """Kept share of every axis per budget."""
    summary = json.loads((ARTIFACTS / "train_extended" / "summary.json").read_text())
    rows = []
    for budget, values in summary.items():
        values = values | {"depth": len(values["kept_layers"])}
        for axis in (*WIDTHS, "depth"):
            entries = values[axis] if isinstance(values[axis], list) else [values[axis]]
            rows.append({"budget": budget, "axis": axis, "kept size (mean over layers)": sum(entries) / len(entries)})
    return (
        alt.Chart(pd.DataFrame(rows))
        .mark_bar()
        .encode(x=alt.X("budget:N", sort=list(summary), title=None), y="kept size (mean over layers):Q", color=color)
        .properties(width=90, height=120)
        .facet(column=alt.Column("axis:N", title=None))
        .resolve_scale(y="independent")
    )


def _importance_chart() -> alt.Chart:
    """Sorted, normalised scores of every unit key, and the depth scores."""
    ranking = json.loads((ARTIFACTS / "rank" / "ranking.json").read_text())
    rows = []
    for key, scores in ranking["scores"].items():
        axis, _, layer = key.partition(".")
        top = max(scores) or 1.0
        for i, score in enumerate(sorted(scores, reverse=True)):
            share = i / max(1, len(scores) - 1)
            rows.append({"axis": axis, "layer": layer or "all", "rank": share, "importance": score / top})
    return (
        alt.Chart(pd.DataFrame(rows))
        .mark_line()
        .encode(
            x=alt.X("rank:Q", title="rank, best to worst"),
            y=alt.Y("importance:Q", title="importance, relative"),
            color=alt.Color("layer:N", scale=alt.Scale(scheme="tableau20")),
        )
        .properties(width=140, height=140)
        .facet(column=alt.Column("axis:N", title=None))
    )


def _depth_chart() -> alt.Chart:
    """The score at which each layer was judged, least important first."""
    scores = json.loads((ARTIFACTS / "rank" / "ranking.json").read_text())["depth_scores"]
    frame = pd.DataFrame({"layer": list(scores), "score": list(scores.values())})
    bars = (
        alt.Chart(frame)
        .mark_bar()
        .encode(
            x=alt.X("layer:N", sort=list(scores), title="layer of the parent, in the order of judgement"),
            y=alt.Y("score:Q", title="error of the logits without it"),
        )
    )
    return bars.properties(width=260, height=160)


def findings(results: list[dict]) -> list[str]:
    """What a reader wants to know first, computed from the table."""
    sentences = []
    parent = results[0]
    for row in results:
        if row["model"] != LABELS["extended"]:
            continue
        difference = row["loss"] - parent["loss"]
        text = f"{row['budget']}: {row['share']:.0%} of the parameters, {difference:+.3f} nats from the parent"
        if row["gap closed"] is not None:
            text += f", {row['gap closed']:.0%} of the loss between its zero-shot slice and the parent won back"
        sentences.append(text)
    return sentences


def as_markdown(results: list[dict]) -> str:
    """The table, numbers aligned; a dash where a column does not apply."""
    frame = pd.DataFrame(results).astype(object)
    frame["parameters"] = frame["parameters"].map("{:,.0f}".format, na_action="ignore")
    lines = ["| " + " | ".join(frame.columns) + " |", "|" + "---|" * len(frame.columns)]
    for row in frame.itertuples(index=False):
        lines.append("| " + " | ".join("–" if pd.isna(value) else str(value) for value in row) + " |")
    return "\n".join(lines)


@errors_as_text()
def main() -> None:
    settings = params.load()
    budgets = [name for name, _ in sorted(settings.budgets.items(), key=lambda item: -item[1])]
    tasks = list(settings.evaluate.tasks)
    results = read_results(settings.budgets)
    pictures = {}
    for title, chart in charts(results, budgets, tasks).items():
        png = vl_convert.vegalite_to_png(chart.to_json(), scale=2)
        pictures[title] = "data:image/png;base64," + base64.b64encode(png).decode()
    content = {
        "title": settings.report.title,
        "findings": findings(results),
        "columns": list(results[0]),
        "legend": LEGEND,
        "rows": results,
        "pictures": pictures,
        "params": Path(params.FILE).read_text(),
    }
    template = jinja2.Template((Path(__file__).parent / "report.html").read_text(), autoescape=True)
    plots = "".join(f"\n### {title}\n\n![{title}]({picture})\n" for title, picture in pictures.items())
    findings_list = "".join(f"- {line}\n" for line in content["findings"])
    markdown = f"# {content['title']}\n\n{findings_list}\n{as_markdown(results)}\n\n{LEGEND}\n\n## Plots\n{plots}"
    OUT.mkdir(exist_ok=True)
    _write(OUT / "report.html", template.render(content))
    _write(OUT / "report.md", markdown)
    _write(OUT / "results.json", json.dumps(results, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


if __name__ == "__main__":
    main()
