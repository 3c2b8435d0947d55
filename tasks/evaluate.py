"""Stage `evaluate`: score the extracted models of a budget. transformers loads them, as it would for any user.

An item is a model and a group of scores. Items are computed one after the other in this process, or by workers at the
same time, each with one model in memory. Finished items are kept, so a stage that was stopped goes on.

- tasks/evaluation/items.py: which items there are, and their scores
- tasks/evaluation/text_scores.py: loss, KL to the parent and bits per byte on held-out text
- tasks/evaluation/lm_eval_tasks.py: reasoning tasks and benchmarks, run by lm-eval
- tasks/evaluation/latency_and_memory.py: decode time and memory
- tasks/evaluation/samples.py: continuations of a few prompts, to read
"""

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from elastic_core.data.loader import TokenData
from elastic_core.io import storage
from elastic_core.io.atomic import write_text
from elastic_core.io.json_files import read_json
from elastic_core.io.provenance_file import read_provenance
from tasks.evaluation import lm_eval_tasks
from tasks.evaluation.items import TEACHER, Item, Models, Setting, compute, element_type, list_items
from tasks.progress.bars import progress_bar
from tasks.runs.job import started
from tasks.runtime.chat_templates import check_chat_template, check_tasks_template
from tasks.runtime.launch import launch_items
from tasks.settings import remote_checks
from tasks.settings.load import FILE, load
from tasks.settings.schema import Params

DATA, PARENT, MODELS, OUT = (Path("artifacts") / name for name in ("data", "parent", "models", "evaluate"))
UNIFORM = "uniform"  # see tasks/extract.py
VERSIONS = ("zero_shot", "short", "extended")


def main(budget: str) -> None:
    """Evaluate all versions of `budget`: "parent", or a name in section budgets or untrained of params.yaml."""
    settings = load()
    section, is_parent = settings.evaluate, budget == "parent"
    TokenData(DATA)  # raises where there are no data
    # Only the benchmarks that lm-eval itself brings need the Hugging Face hub. Without them, no network is needed.
    if section.benchmarks is None or section.benchmarks.include is not None:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    transformers.utils.logging.disable_progress_bar()
    if is_parent:  # the first of these stages; a bad benchmark should not wait for the other scores
        check_chat_template(section.benchmarks, DATA / "tokenizer", f"{FILE}: evaluate.benchmarks")
        check_tasks_template(section.tasks, DATA / "tokenizer", f"{FILE}: evaluate.tasks")
        lm_eval_tasks.check_benchmark_tasks(section.benchmarks, f"{FILE}: evaluate.benchmarks", download=True)
    directories = {"parent": PARENT} if is_parent else {v: MODELS / budget / v for v in VERSIONS}
    submodel = None if is_parent else read_json(MODELS / budget / "submodel.json")
    uniform = MODELS / budget / UNIFORM
    items = list_items(
        section,
        directories,
        None if is_parent else PARENT,
        uniform if uniform.is_dir() else None,
        split=settings.compute.workers > 0,
    )
    with places(budget, settings) as (directory, states):
        setting = Setting(section, DATA, None if is_parent else PARENT, states, directory)
        found = evaluate(budget, items, setting, settings)
        origins = {version: read_provenance(path) for version, path in directories.items()}
        rows = assemble(items, found, {v: {"submodel": submodel, "provenance": origins[v]} for v in directories})
        write_text(OUT / f"{budget}.json", json.dumps(rows, indent=1) + "\n")


def evaluate(budget: str, items: list[Item], setting: Setting, settings: Params) -> dict[str, dict]:
    """Item → its scores. Those that an earlier run of the stage has finished are read from its files.

    Not those of another element type, as after a move to GPUs: one table would have two roundings.
    """
    kind = element_type(setting.section.dtype, settings.compute.gpus_per_worker > 0)
    files = {item.name: setting.logs / f"{item.name}.{kind}.json" for item in items}
    found = {name: read_json(file) for name, file in files.items() if file.is_file()}
    if found.get(TEACHER, {}).get("states") != setting.states:  # computed for workers that reach another place
        found.pop(TEACHER, None)
    work = functools.partial(compute_item, setting, {})
    with progress_bar(f"evaluate {budget}", len(items), "item") as bar:
        bar.update(len(found))

        def done(item: Item, scores: dict) -> None:
            write_text(files[item.name], json.dumps(scores) + "\n")
            found[item.name] = scores
            bar.update()

        launch_items(work, items, settings.compute, done, found.keys())
    return found


def compute_item(setting: Setting, kept: dict, item: Item, device: torch.device) -> dict:
    """The scores of an item. `kept` holds the models of this process, so that the next item finds its model loaded.

    A task of Ray has a `kept` of its own, so it loads its model.
    """
    transformers.utils.logging.disable_progress_bar()
    models = kept.setdefault(device, Models(device, setting.section.dtype))
    return compute(item, setting, models)


def assemble(items: list[Item], found: dict[str, dict], origins: dict[str, dict]) -> dict[str, dict]:
    """Version → all of its scores. `origins`: version → its submodel and provenance."""
    rows = {}
    for version, origin in origins.items():
        groups: dict[str, dict] = {}
        for item in items:
            if item.name.startswith(f"{version}-"):
                groups[item.group] = groups.get(item.group, {}) | found[item.name]
        tasks = {group: groups.get(group, {}) for group in ("tasks", "benchmarks")}
        rows[version] = groups["text"] | {"memory": groups["memory"]} | tasks | origin | found["speed"]
        rows[version] |= groups.get("samples", {})  # of the last version
    if "uniform-text" in found:
        rows["zero_shot"]["uniform"] = found["uniform-text"]
    return rows


@contextlib.contextmanager
def places(budget: str, settings: Params) -> Iterator[tuple[Path, str]]:
    """Where the finished items are (on this machine), and the states of the parent (where every worker reaches them).

    They stay until DVC has the stage's output (old_runs.py). Where there is no dvc.yaml, as in a call from Python, no
    later run can know them again, and they are in a temporary directory.
    """
    workers = settings.compute.workers > 0
    if not Path("dvc.yaml").is_file():
        with tempfile.TemporaryDirectory(dir=OUT.parent) as directory:
            yield Path(directory).absolute(), directory
        return
    if workers:
        remote_checks.check(settings, "compute")
    name = "evaluate_parent" if budget == "parent" else f"evaluate@{budget}"
    name = f"evaluate_untrained@{budget}" if budget in settings.untrained else name
    with started(name, settings if workers else None) as job:
        location = job.checkpoints(settings) if workers else str(job.directory)
        yield job.directory, storage.join(location, "states")
