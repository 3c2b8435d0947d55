"""Stage `evaluate`: score the extracted models of a budget. transformers loads them, as it would for any user.

- tasks/evaluation/text_scores.py: loss, KL to the parent and bits per byte on held-out text
- tasks/evaluation/lm_eval_tasks.py: reasoning tasks and benchmarks, run by lm-eval
- tasks/evaluation/latency_and_memory.py: decode time and memory
- tasks/evaluation/samples.py: continuations of a few prompts, to read
"""

import json
import os
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from elastic_core.data.loader import TokenData
from elastic_core.io.atomic import write_text
from elastic_core.io.json_files import read_json
from elastic_core.io.provenance_file import read_provenance
from elastic_core.model.ops import transformers_kernels
from tasks.evaluation import latency_and_memory, lm_eval_tasks
from tasks.evaluation.samples import samples
from tasks.evaluation.text_scores import count_parameters, first_tokens, held_out_scores
from tasks.progress.bars import progress_bar
from tasks.runtime.chat_templates import check_chat_template, check_tasks_template
from tasks.settings.load import FILE, load
from tasks.settings.sections import Evaluate

DATA, PARENT, MODELS, OUT = (Path("artifacts") / name for name in ("data", "parent", "models", "evaluate"))
UNIFORM = "uniform"  # see tasks/extract.py
VERSIONS = ("zero_shot", "short", "extended")


def main(budget: str) -> None:
    """Evaluate all versions of `budget`: "parent", or a name in section budgets or untrained of params.yaml."""
    section, data = load().evaluate, TokenData(DATA)
    # Only the benchmarks that lm-eval itself brings need the Hugging Face hub. Without them, no network is needed.
    if section.benchmarks is None or section.benchmarks.include is not None:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    transformers.utils.logging.disable_progress_bar()
    if budget == "parent":  # the first of these stages; a bad benchmark should not wait for the other scores
        check_chat_template(section.benchmarks, DATA / "tokenizer", f"{FILE}: evaluate.benchmarks")
        check_tasks_template(section.tasks, DATA / "tokenizer", f"{FILE}: evaluate.tasks")
        lm_eval_tasks.check_benchmark_tasks(section.benchmarks, f"{FILE}: evaluate.benchmarks", download=True)
    parent = None if budget == "parent" else load_model(PARENT)
    directories = {"parent": PARENT} if budget == "parent" else {v: MODELS / budget / v for v in VERSIONS}
    submodel = None if budget == "parent" else read_json(MODELS / budget / "submodel.json")
    rows = {}
    with progress_bar(f"evaluate {budget}", len(directories), "model") as bar:
        for version, directory in directories.items():
            model = load_model(directory)
            rows[version] = evaluate(section, data, model, parent)
            rows[version] |= {"submodel": submodel, "provenance": read_provenance(directory)}
            bar.update()
    # All versions have one shape and so one speed: it is measured once, with the last version.
    speed = {
        "latency": latency_and_memory.latency(
            section.latency, model, parent, first_tokens(data, section.held_out[0], section.latency.prompt_tokens)
        ),
        "environment": latency_and_memory.environment(),
    }
    rows = {version: values | speed for version, values in rows.items()}
    rows[version]["samples"] = samples(section, data, model)
    if (uniform := MODELS / budget / UNIFORM).is_dir():
        model = load_model(uniform)
        rows["zero_shot"]["uniform"] = count_parameters(model) | held_out_scores(section, data, model, parent)
    write_text(OUT / f"{budget}.json", json.dumps(rows, indent=1) + "\n")


def load_model(directory: Path):
    """Load a model directory with transformers. Heterogeneous models need remote code: their own modeling file."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=True).eval()
    transformers_kernels.choose_by_device()
    return model


def evaluate(section: Evaluate, data: TokenData, model, parent) -> dict:
    """All scores of one model. `parent` is the model to compare with, or None for the parent itself."""
    return {
        **count_parameters(model),
        **held_out_scores(section, data, model, parent),
        "memory": latency_and_memory.memory(model, first_tokens(data, section.held_out[0], section.cache_tokens)),
        "tasks": lm_eval_tasks.reasoning_scores(section, data, model),
        "benchmarks": lm_eval_tasks.benchmark_scores(section.benchmarks, data, model),
    }
