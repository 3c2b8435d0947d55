"""Where a run comes from: parent, data, budgets, stages, code, packages and devices. The only module that looks there.

Most of it is in params.yaml, in artifacts/data and in the metrics of the training stages. The commits,
devices and times of the stages are those in the provenance of the evaluated models.
"""

import json
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from elastic_core.model import architectures
from tasks.progress.durations import duration
from tasks.progress.metrics_file import read_rows
from tasks.reporting import tables
from tasks.reporting.data import MISSING, Table, data_tables
from tasks.runs.provenance import git
from tasks.settings.schema import Params

DATA = tables.ARTIFACTS / "data"
FAMILY, MODELS = tables.ARTIFACTS / "train_extended" / "model", tables.ARTIFACTS / "models"
CODE = ("tasks", "elastic_core", "params.yaml", "profiles", "requirements.lock")  # what decides results
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "ray", "lm_eval", "dvc")


@dataclass(frozen=True)
class Provenance:
    """`facts`: name → text. `tables`: the data and the stages."""

    facts: dict[str, str]
    tables: list[Table]


def collect(settings: Params, scores: tables.Scores, config) -> Provenance:
    """Everything that the report says about its origin. `config`: the parent's configuration."""
    return Provenance(
        {
            "parent": describe_parent(settings, scores, config),
            "budgets": describe_budgets(settings),
            "seed": str(settings.seed),
            "code": commit() or "not in a git repository",
            "packages": packages(),
            **devices(scores),
            "elastic checkpoint": str(FAMILY),
            "models": ", ".join(str(MODELS / budget) for budget in scores if budget != "parent")
            + f" (directories {', '.join(tables.LABELS)})",
            "parameters": "params.yaml, at the end of this page",
        },
        [*data_tables(settings, DATA), stages_table(scores)],
    )


def describe_parent(settings: Params, scores: tables.Scores, config) -> str:
    origin = "trained here by stage parent" if settings.parent.path is None else str(settings.parent.path)
    count = scores["parent"]["parent"]["num_parameters"]
    return f"{origin}: {config.model_type}, layers {architectures.pattern(config)}, {count:,} parameters"


def describe_budgets(settings: Params) -> str:
    text = ", ".join(f"{name}: {budget}" for name, budget in settings.budgets.items())
    if settings.untrained:
        text += f"; not trained: {', '.join(f'{name}: {budget}' for name, budget in settings.untrained.items())}"
    return f"{text}; counted in {settings.cost.metric.replace('_', ' ')}"


def stages_table(scores: tables.Scores) -> Table:
    """A row per stage of which something is known: steps, tokens, time, device and commit."""
    models = [values for found in scores.values() for values in found.values()]
    told = {record["stage"]: record for values in models for record in values["provenance"]}
    measured = {stage: training(stage) for stage in tables.STAGES}
    names = [*(stage for stage in measured if measured[stage] and stage not in told), *told]
    rows = []
    for name in names:
        values = {**(measured.get(name) or {}), **{k: v for k, v in told.get(name, {}).items() if v is not None}}
        code = (values.get("commit") or "")[:12]
        if code and values.get("clean") is False:
            code += " with changes"
        rows.append(
            (
                name,
                *(f"{values[key]:,}" if key in values else MISSING for key in ("steps", "tokens")),
                duration(values["seconds"]) if "seconds" in values else MISSING,
                values.get("device", MISSING),
                code or MISSING,
            )
        )
    return Table("Stages", ("stage", "steps", "tokens", "time", "device", "commit"), rows)


def training(stage: str) -> dict | None:
    """Steps, tokens and seconds of a training stage, from its metrics. None for a parent that was not trained here."""
    name = "parent_metrics.jsonl" if stage == "parent" else f"{stage}/metrics.jsonl"
    rows = read_rows(tables.ARTIFACTS / name)
    if not rows:
        return None
    found = {"steps": rows[-1]["step"], "tokens": rows[-1]["tokens"]}
    return found | ({"seconds": sum(row["seconds"] for row in rows)} if all("seconds" in row for row in rows) else {})


def packages() -> str:
    """Versions of this package, Python and the packages that decide results."""
    found = [f"nemotron-elastic {version('nemotron-elastic')}", f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def devices(scores: tables.Scores) -> dict[str, str]:
    """The devices of the evaluation, each with the versions that it used."""
    environments = {
        json.dumps(values["environment"]): values["environment"]
        for found in scores.values()
        for values in found.values()
    }
    return {
        f"evaluated on {environment['device']}, {environment['cores']} cores": ", ".join(
            f"{name} {environment[name]}" for name in ("python", "torch", "transformers", "lm_eval")
        )
        for environment in environments.values()
    }


def commit() -> str | None:
    """The last commit that changed the pipeline's code, and whether files differ from it. None outside of git."""
    top = git(Path(), "rev-parse", "--show-toplevel")
    if not top or not (found := git(Path(top), "log", "-1", "--format=%h", "--", *CODE)):
        return None
    changed = git(Path(top), "status", "--porcelain", "--", *CODE)
    state = "with changes that are not committed" if changed else "without other changes"
    return f"commit {found}, the last one that changed the pipeline, {state}"
