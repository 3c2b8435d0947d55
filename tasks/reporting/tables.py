"""Makes the tables of the report: results, training, the router's choices, importance. Reads artifacts/."""

from pathlib import Path

import pandas as pd
from transformers import PreTrainedConfig

from elastic_core.io.json_files import read_json
from elastic_core.model import architectures, hf
from elastic_core.model.axes import AXES, FIELDS
from elastic_core.model.submodel import Submodel
from tasks.progress.metrics_file import read_rows

ARTIFACTS = Path("artifacts")
LABELS = {"zero_shot": "zero-shot slice", "short": "after stage 1", "extended": "after stage 2"}
FINAL = "extended"  # the version that is shown if a budget has a single row
STAGES = ("parent", "train_short", "train_extended")
POINTS = 60  # points per curve
CELLS = 48  # the most cells per row of the heat map of importance
MIB = 2**20

Scores = dict[str, dict[str, dict]]  # budget (or "parent") → version → the scores that stage evaluate writes


def read_scores(budgets: dict[str, float]) -> Scores:
    """The scores of the parent and of every budget, the largest first.

    `budgets`: name → share of the parent's cost.
    """
    names = ["parent", *sorted(budgets, key=lambda name: -budgets[name])]
    scores = {name: read_json(ARTIFACTS / "evaluate" / f"{name}.json") for name in names}
    for name, target in budgets.items():
        if target == 1.0:
            del scores[name]["zero_shot"]  # the same model as the parent
    return scores


def results(scores: Scores) -> pd.DataFrame:
    """A row per budget and version, the parent first. The standard error of a task is in the column `<task>_error`.

    Losses are in nats per token, times in milliseconds or divided by the parent's, memory in MiB.
    """
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
    active = values.get("num_active_parameters")  # only models with experts have it
    return {} if active is None else {"active_parameters": active}


def _text_and_cost(values: dict) -> dict:
    memory, latency = values["memory"], values["latency"]
    return {
        **{name: value for name, value in values.items() if name.startswith("bits_per_byte")},
        **{f"loss_{source}": values[f"loss_{source}"] for source in conversations(values)},
        **{f"loss_at_{length}": found["loss"] for length, found in values.get("lengths", {}).items()},
        **_ratios("latency_ratio", latency["per_token_ratio"], latency["per_token_ratio_quartiles"]),
        **_ratios("prefill_ratio", latency["prefill_ratio"], latency["prefill_ratio_quartiles"]),
        "ms_per_token": 1000 * latency["per_token_seconds"],
        "parent_ms_per_token": 1000 * latency["parent_per_token_seconds"],
        "weight_mib": memory["weight_bytes"] / MIB,
        "cache_mib": memory["cache_bytes"] / MIB,
        "memory_mib": (memory["weight_bytes"] + memory["cache_bytes"]) / MIB,
    }


def conversations(values: dict) -> list[str]:
    """The held-out sources in which only a part of the tokens is predicted. They have no bits per byte."""
    sources = [name.removeprefix("loss_") for name in values if name.startswith("loss_")]
    return [source for source in sources if f"bits_per_byte_{source}" not in values]


def _ratios(name: str, ratio: float, quartiles: list[float]) -> dict:
    return {name: ratio, f"{name}_low": quartiles[0], f"{name}_high": quartiles[1]}


def _tasks(values: dict) -> dict:
    found = {}
    for task, result in values["tasks"].items():
        found |= {task: result["exact_match"], f"{task}_error": result["standard_error"]}
    for task, result in values["benchmarks"].items():
        found |= {task: result["value"], f"{task}_error": result["standard_error"]}
    return found


def chance(scores: Scores) -> dict[str, float]:
    """Task → the score of guessing."""
    return {task: result["chance"] for task, result in scores["parent"]["parent"]["tasks"].items()}


def finals(frame: pd.DataFrame) -> pd.DataFrame:
    """The row of the parent, and for every budget the row of its last version."""
    return frame[frame["model"].isin(["parent", LABELS[FINAL]])]


def records(frame: pd.DataFrame) -> list[dict]:
    """The rows as dictionaries. A missing value is None."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def metrics(frame: pd.DataFrame, tasks: list[str]) -> dict[str, dict]:
    """Budget → a few numbers to compare between runs. Seconds are left out, because they depend on the machine."""
    names = ["parameters", "share", "loss", "kl_to_parent", "bits_per_byte", "latency_ratio"]
    names += ["weight_mib", "cache_mib", *tasks]
    present = [name for name in names if name in frame]  # conversations have no bits per byte
    rows = finals(frame).set_index("budget")[present].astype(object)
    return {
        budget: {name: value if isinstance(value, int) else float(f"{value:.6g}") for name, value in row.items()}
        for budget, row in rows.iterrows()
    }


def once_per_budget(frame: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """The results, in which numbers that all versions of a budget share stand in the row of the last version only."""
    last = frame["model"].isin(["parent", LABELS[FINAL]])
    return frame.assign(**{name: frame[name].where(last) for name in names})


def rounded(frame: pd.DataFrame, described: dict, guesses: dict[str, float]) -> list[dict]:
    """The results as plain rows with the same keys, rounded to the digits of their columns. The last row is guessing.

    described: name → column. guesses: task → the score of guessing.
    """
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
    """The rows of the Pareto front, by rising cost. `cost` and `quality` are columns in which lower is better.

    If several rows are equal, the first one is taken.
    """
    best, kept = float("inf"), []
    for index, row in frame.sort_values([cost, quality], kind="stable").iterrows():
        if row[quality] < best:
            best = row[quality]
            kept.append(index)
    return frame.loc[kept]


def training() -> pd.DataFrame:
    """Loss, KL and budget error by budget over the tokens of each stage. Every point is the mean of nearby steps.

    Columns: stage, tokens, budget, loss (what training minimised), kl, budget_error, ce (cross-entropy with the text),
    and state (distance of the states from the teacher's) if it is in the loss. Losses are in nats per token.
    """
    measures, rows = ["loss", "kl", "budget_error", "ce", "state"], []
    for stage in STAGES:
        path = ARTIFACTS / ("parent_metrics.jsonl" if stage == "parent" else f"{stage}/metrics.jsonl")
        for step in read_rows(path):
            for budget, numbers in step["budgets"].items():
                name = "parent" if stage == "parent" else budget
                values = {measure: numbers.get(measure) for measure in measures}
                rows.append({"stage": stage, "tokens": step["tokens"], "budget": name} | values)
    if all(row["state"] is None for row in rows):
        measures.remove("state")
    frame = pd.DataFrame(rows, columns=["stage", "tokens", "budget", *measures])
    frame = frame.astype(dict.fromkeys(measures, float))  # a skipped step has null
    if frame.empty:
        return frame
    bins = frame.groupby("stage")["tokens"].transform(lambda tokens: pd.cut(tokens, POINTS, labels=False))
    means = frame.groupby(["stage", "budget", bins.rename("bin")], as_index=False).mean(numeric_only=True)
    return means[["stage", "tokens", "budget", *measures]]


def settled() -> int | None:
    """The tokens of stage 1 after which the router's choice was fixed. None if there is no such point."""
    rows = read_rows(ARTIFACTS / "train_short" / "metrics.jsonl")
    soft = [row["tokens"] for row in rows if row["mode"] == "soft"]
    return max(soft) if soft and rows[-1]["mode"] != "soft" else None


def parent_config() -> PreTrainedConfig:
    """The parent's configuration, as stage rank writes it."""
    return hf.read_config(ARTIFACTS / "rank" / "model")


def router(scores: Scores, config) -> pd.DataFrame:
    """The sizes that every budget keeps.

    Columns: budget, axis, layer (number and type, or "all"), size, and kept (the size as a share of the parent's).
    Size and kept are missing for a dropped layer.
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
    """Number and type of a layer, such as ``3 M``. The empty string gives "all": an axis of the whole model."""
    return f"{layer} {pattern[int(layer)]}" if layer else "all"


def importance(config) -> pd.DataFrame:
    """Importance of the units of every axis and layer, the most important first.

    Columns: axis, layer, rank (0 for the most important unit, 1 for the least), and importance (divided by that of the
    layer's most important unit). If a layer has many units, a row is the mean of neighbouring ranks. For the neurons of
    experts it is the mean over all experts.
    """
    pattern, rows = architectures.pattern(config), []
    ranking = read_json(ARTIFACTS / "rank" / "ranking.json")
    for key in sorted(ranking["scores"], key=_sort_key):
        axis, _, layer = key.partition(".")
        scores = _sorted_scores(ranking["scores"][key])
        top, count = scores[0] or 1.0, len(scores)
        cells = min(CELLS, count)
        for i in range(cells):
            cell = scores[i * count // cells : (i + 1) * count // cells]
            rank = i / max(1, cells - 1)
            value = sum(cell) / len(cell) / top
            rows.append({"axis": FIELDS[axis], "layer": layer_name(layer, pattern), "rank": rank, "importance": value})
    return pd.DataFrame(rows)


def _sorted_scores(scores: list) -> list[float]:
    """The scores, best first. With a row per expert: the mean of the experts' best, of their second best, and so on."""
    if isinstance(scores[0], list):
        ranks = zip(*(sorted(row, reverse=True) for row in scores), strict=True)
        return [sum(rank) / len(rank) for rank in ranks]
    return sorted(scores, reverse=True)


def _sort_key(key: str) -> tuple[int, int]:
    axis, _, layer = key.partition(".")
    return AXES.index(axis), int(layer or 0)


def depth(config) -> pd.DataFrame:
    """The score of every layer in the depth ranking, the least important first. Columns: layer, score."""
    scores = read_json(ARTIFACTS / "rank" / "ranking.json")["depth_scores"]
    pattern = architectures.pattern(config)
    return pd.DataFrame(
        {"layer": [layer_name(layer, pattern) for layer in scores], "score": [float(s) for s in scores.values()]}
    )
