"""What the report shows, as tables: results, training, the router's choices, importance. No drawing, no wording."""

import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

from elastic_core.model import architectures
from elastic_core.model.axes import AXES, FIELDS
from elastic_core.model.submodel import Submodel
from tasks.progress.metrics_file import read_rows

ARTIFACTS = Path("artifacts")
LABELS = {"zero_shot": "zero-shot slice", "short": "after stage 1", "extended": "after stage 2"}
FINAL = "extended"  # what a budget's name stands for where it has one row
STAGES = ("parent", "train_short", "train_extended")
POINTS = 60  # of every curve
PIECES = 48  # of every row of the heat map of importance
MIB = 2**20

Scores = dict[str, dict[str, dict]]  # model → version → what tasks/evaluate.py writes


def read_scores(budgets: dict[str, float]) -> Scores:
    """The scores of the parent and of every budget, the largest first."""
    names = ["parent", *sorted(budgets, key=lambda name: -budgets[name])]
    scores = {name: json.loads((ARTIFACTS / "evaluate" / f"{name}.json").read_text()) for name in names}
    for name, target in budgets.items():
        if target == 1.0:
            del scores[name]["zero_shot"]  # the parent itself
    return scores


def results(scores: Scores) -> pd.DataFrame:
    """A row per model, the parent first. A task's standard error stands beside it, as `<task>_error`."""
    parent = scores["parent"]["parent"]
    rows = []
    for budget, versions in scores.items():
        for version, values in versions.items():
            zero_shot = versions.get("zero_shot", {}).get("loss")
            gap = None if zero_shot is None else zero_shot - parent["loss"]
            row = {
                "budget": budget,
                "model": LABELS.get(version, version),
                "parameters": values["num_parameters"],
                **_active(values),
                "share": values["num_parameters"] / parent["num_parameters"],
                "loss": values["loss"],
                "kl_to_parent": values["kl_to_parent"],
                "gap_closed": (zero_shot - values["loss"]) / gap if gap else None,
            }
            rows.append(row | _text_and_cost(values) | _tasks(values))
    return pd.DataFrame(rows)


def _active(values: dict) -> dict:
    active = values.get("num_active_parameters")  # of models with experts
    return {} if active is None else {"active_parameters": active}


def _text_and_cost(values: dict) -> dict:
    memory, latency = values["memory"], values["latency"]
    return {
        **{name: value for name, value in values.items() if name.startswith("bits_per_byte")},
        "ms_per_token": 1000 * latency["per_token_seconds"],
        "latency_ratio": latency["per_token_ratio"],
        "prefill_ms": 1000 * latency["prefill_seconds"],
        "prefill_ratio": latency["prefill_ratio"],
        "weight_mib": memory["weight_bytes"] / MIB,
        "cache_mib": memory["cache_bytes"] / MIB,
        "memory_mib": (memory["weight_bytes"] + memory["cache_bytes"]) / MIB,
    }


def _tasks(values: dict) -> dict:
    found = {}
    for task, result in values["tasks"].items():
        found |= {task: result["exact_match"], f"{task}_error": result["standard_error"]}
    for task, result in values["benchmarks"].items():
        found |= {task: result["value"], f"{task}_error": result["standard_error"]}
    return found


def chance(scores: Scores) -> dict[str, float]:
    """What guessing scores, by task."""
    return {task: result["chance"] for task, result in scores["parent"]["parent"]["tasks"].items()}


def finals(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the parent and of every budget's last version."""
    return frame[frame["model"].isin(["parent", LABELS[FINAL]])]


def records(frame: pd.DataFrame) -> list[dict]:
    """The rows as dictionaries, None where a value is missing."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def metrics(frame: pd.DataFrame, tasks: list[str]) -> dict[str, dict]:
    """The few numbers of every model that are compared between runs, of times only what is a ratio in one run."""
    names = ["parameters", "share", "loss", "kl_to_parent", "bits_per_byte", "latency_ratio"]
    names += ["weight_mib", "cache_mib", *tasks]
    rows = finals(frame).set_index("budget")[names].astype(object)
    return {
        budget: {name: value if isinstance(value, int) else float(f"{value:.6g}") for name, value in row.items()}
        for budget, row in rows.iterrows()
    }


def rounded(frame: pd.DataFrame, described: dict, guesses: dict[str, float]) -> list[dict]:
    """The results as plain rows with the same keys in each, rounded as their columns say; last what guessing scores."""
    rows = []
    for record in records(frame):
        row = {"budget": record["budget"], "model": record["model"]}
        for name, column in described.items():
            row[column.title] = column.round(record[name])
        rows.append(row)
    if guesses:
        found = {described[task].title: round(value, 3) for task, value in guesses.items()}
        rows.append(dict.fromkeys(rows[0]) | {"budget": "–", "model": "guessing"} | found)
    return rows


def pareto(frame: pd.DataFrame, cost: str, quality: str = "loss") -> pd.DataFrame:
    """The rows that no other row beats, at most as dear and at least as good, by rising cost; of equals the first."""
    best, kept = float("inf"), []
    for index, row in frame.sort_values([cost, quality], kind="stable").iterrows():
        if row[quality] < best:
            best = row[quality]
            kept.append(index)
    return frame.loc[kept]


def training() -> pd.DataFrame:
    """Loss, KL and budget error by budget over the tokens of each stage, every point the mean of the steps around it.

    Columns stage, tokens, budget, loss (what was minimised), kl, budget_error and ce (cross-entropy with the text).
    """
    measures = ["loss", "kl", "budget_error", "ce"]
    rows = []
    for stage in STAGES:
        path = ARTIFACTS / ("parent_metrics.jsonl" if stage == "parent" else f"{stage}/metrics.jsonl")
        for step in read_rows(path):
            for budget, numbers in step["budgets"].items():
                name = "parent" if stage == "parent" else budget
                values = {measure: numbers.get(measure) for measure in measures}
                rows.append({"stage": stage, "tokens": step["tokens"], "budget": name} | values)
    frame = pd.DataFrame(rows, columns=["stage", "tokens", "budget", *measures])
    frame = frame.astype(dict.fromkeys(measures, float))  # null: a step that was skipped
    if frame.empty:
        return frame
    bins = frame.groupby("stage")["tokens"].transform(lambda tokens: pd.cut(tokens, POINTS, labels=False))
    means = frame.groupby(["stage", "budget", bins.rename("bin")], as_index=False).mean(numeric_only=True)
    return means[["stage", "tokens", "budget", *measures]]


def settled() -> int | None:
    """Tokens of stage 1 at which the router's choice was taken and training went on sliced."""
    rows = read_rows(ARTIFACTS / "train_short" / "metrics.jsonl")
    soft = [row["tokens"] for row in rows if row["mode"] == "soft"]
    return max(soft) if soft and rows[-1]["mode"] != "soft" else None


def parent_config() -> SimpleNamespace:
    """The parent's config.json; as the rank stage writes it, every value said."""
    return SimpleNamespace(**json.loads((ARTIFACTS / "rank" / "model" / "config.json").read_text()))


def router(scores: Scores, config) -> pd.DataFrame:
    """What every budget keeps: budget, axis, layer (number and type, or "all"), size, and kept, its share.

    Both are missing for a layer that is dropped.
    """
    pattern, rows = architectures.pattern(config), []
    for budget, versions in scores.items():
        if budget == "parent":
            continue
        submodel = Submodel(**versions[FINAL]["submodel"]).resolve(config)
        sizes, units = submodel.sizes(config), architectures.units(config)
        for axis in AXES:
            for key in [key for key in sizes if key.partition(".")[0] == axis]:
                layer = key.partition(".")[2]
                is_kept = layer == "" or int(layer) in submodel.kept_layers
                size, full = sizes[key], units[key].size
                rows.append(
                    {
                        "budget": budget,
                        "axis": FIELDS[axis],
                        "layer": layer_name(layer, pattern),
                        "kept": size / full if is_kept else None,
                        "size": size if is_kept else None,
                    }
                )
    return pd.DataFrame(rows)


def layer_name(layer: str, pattern: str) -> str:
    """Number and type of a layer, such as ``3 M``; "all" for what belongs to none."""
    return f"{layer} {pattern[int(layer)]}" if layer else "all"


def importance(config) -> pd.DataFrame:
    """Importance of the units of every axis and layer, best first: axis, layer, rank (0 to 1), importance.

    Relative to the best unit of the layer; of many units, the mean of those around a rank; of neurons of experts, the
    mean of all experts.
    """
    pattern, rows = architectures.pattern(config), []
    ranking = json.loads((ARTIFACTS / "rank" / "ranking.json").read_text())
    for key in sorted(ranking["scores"], key=lambda key: _place(key)):
        axis, _, layer = key.partition(".")
        scores = _sorted_scores(ranking["scores"][key])
        top, count = scores[0] or 1.0, len(scores)
        pieces = min(PIECES, count)
        for i in range(pieces):
            piece = scores[i * count // pieces : (i + 1) * count // pieces]
            rank = i / max(1, pieces - 1)
            value = sum(piece) / len(piece) / top
            rows.append({"axis": FIELDS[axis], "layer": layer_name(layer, pattern), "rank": rank, "importance": value})
    return pd.DataFrame(rows)


def _sorted_scores(scores: list) -> list[float]:
    """Best first; of a row per expert, the mean of the best of each, of the second of each, and so on."""
    if isinstance(scores[0], list):
        places = zip(*(sorted(row, reverse=True) for row in scores), strict=True)
        return [sum(place) / len(place) for place in places]
    return sorted(scores, reverse=True)


def _place(key: str) -> tuple[int, int]:
    axis, _, layer = key.partition(".")
    return AXES.index(axis), int(layer or 0)


def depth(config) -> pd.DataFrame:
    """The layers in the order in which they were judged, least important first: layer, score."""
    scores = json.loads((ARTIFACTS / "rank" / "ranking.json").read_text())["depth_scores"]
    pattern = architectures.pattern(config)
    return pd.DataFrame(
        {"layer": [layer_name(layer, pattern) for layer in scores], "score": [float(s) for s in scores.values()]}
    )
