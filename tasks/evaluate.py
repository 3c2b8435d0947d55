"""Stage `evaluate`: what an extracted directory is worth, loaded as any user would load it.

Held-out text gives loss, KL to the parent and bits per byte (tasks/evaluation/text_scores.py). The reasoning tasks and
benchmarks run through lm-eval (lm_eval_tasks.py). Memory and speed are in latency_and_memory.py.
"""

import json
import os
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from elastic_core.data.loader import TokenData
from elastic_core.io.atomic import write_text
from tasks.evaluation import latency_and_memory, lm_eval_tasks
from tasks.evaluation.text_scores import count_parameters, first_tokens, held_out_scores
from tasks.progress.bars import progress_bar
from tasks.settings.load import load
from tasks.settings.sections import Evaluate

DATA, PARENT, MODELS, OUT = (Path("artifacts") / name for name in ("data", "parent", "models", "evaluate"))
UNIFORM = "uniform"  # see tasks/extract.py
VERSIONS = ("zero_shot", "short", "extended")


def main(budget: str) -> None:
    """Evaluate all versions of `budget`, a name in params.yaml, in budgets or untrained; or `parent`."""
    section, data = load().evaluate, TokenData(DATA)
    if section.benchmarks is None or section.benchmarks.include is not None:  # lm-eval's own tasks need the hub
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    transformers.utils.logging.disable_progress_bar()
    parent = None if budget == "parent" else load_model(PARENT)
    directories = {"parent": PARENT} if budget == "parent" else {v: MODELS / budget / v for v in VERSIONS}
    submodel = None if budget == "parent" else json.loads((MODELS / budget / "submodel.json").read_text())
    rows = {}
    with progress_bar(f"evaluate {budget}", len(directories), "model") as bar:
        for version, directory in directories.items():
            rows[version] = evaluate(section, data, directory, parent) | {"submodel": submodel}
            bar.update()
    if (uniform := MODELS / budget / UNIFORM).is_dir():
        model = load_model(uniform)
        rows["zero_shot"]["uniform"] = count_parameters(model) | held_out_scores(section, data, model, parent)
    write_text(OUT / f"{budget}.json", json.dumps(rows, indent=1) + "\n")


def load_model(directory: Path):
    """The directory as transformers loads it; heterogeneous exports bring their modeling file."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=True).eval()


def evaluate(section: Evaluate, data: TokenData, directory: Path, parent) -> dict:
    """All scores of one directory."""
    model, source = load_model(directory), section.held_out[0]
    return {
        **count_parameters(model),
        **held_out_scores(section, data, model, parent),
        "memory": latency_and_memory.memory(model, first_tokens(data, source, section.cache_tokens)),
        "latency": latency_and_memory.latency(
            section.latency, model, parent, first_tokens(data, source, section.latency.prompt_tokens)
        ),
        "tasks": lm_eval_tasks.reasoning_scores(section, data, model),
        "benchmarks": lm_eval_tasks.benchmark_scores(section.benchmarks, data, model),
        "environment": latency_and_memory.environment(),
    }
