"""Runs lm-eval: the reasoning tasks that are made with the data, and the benchmarks that a profile names."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from elastic_core.data.loader import TokenData
from tasks.settings.sections import Benchmarks, Evaluate

METRICS = ("acc_norm", "acc", "exact_match")  # a task shows the first of these that it has, else its first metric
RESAMPLES = 1000  # bootstrap, for the standard error of metrics without a formula


class QuietHFLM(HFLM):
    """lm-eval's adapter of a transformers model, without its progress bars."""

    def generate_until(self, requests, disable_tqdm=True):
        return super().generate_until(requests, disable_tqdm=True)

    def loglikelihood(self, requests, disable_tqdm=True):
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests, disable_tqdm=True):
        return super().loglikelihood_rolling(requests, disable_tqdm=True)


def reasoning_scores(section: Evaluate, data: TokenData, model) -> dict:
    """Task → exact match (0 to 1), its standard error, the exact match of guessing, and the number of items."""
    if not section.tasks:
        return {}
    directory = data.directory / "lm_eval"
    results = _evaluate(section.tasks, data, model, directory, section.task_batch_size, section.limit)
    scores = {}
    for task in section.tasks:
        value = float(results["results"][task]["exact_match,answer"])
        metadata = results["configs"][task]["metadata"]
        num_items = results["n-samples"][task]["effective"]
        scores[task] = {
            "exact_match": value,
            "standard_error": math.sqrt(value * (1 - value) / num_items),
            "chance": metadata.get("chance_in_context", metadata["chance"]),
            "items": num_items,
        }
    return scores


def benchmark_scores(section: Benchmarks | None, data: TokenData, model) -> dict:
    """Task → the shown metric, its value, its standard error, the number of items, and all metrics.

    The standard error is None if lm-eval has none. Returns {} for `section` None.
    """
    if section is None:
        return {}
    include = None if section.include is None else Path(section.include)
    results = _evaluate(
        section.tasks, data, model, include, section.batch_size, section.limit, section.num_fewshot, section.data_root
    )
    return {task: _summary(task, results) for task in section.tasks}


def _summary(task: str, results: dict) -> dict:
    """The scores of one task or group out of lm-eval's results."""
    values = results["results"][task]
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
    metrics = {name: value for name, value in numbers.items() if "," in name and "_stderr," not in name}
    names = {name.partition(",")[0]: name for name in reversed(metrics)}  # if there are several filters, the first
    name = next((name for name in METRICS if name in names), next(reversed(names)))
    metric = names[name]
    return {
        "metric": name,
        "value": metrics[metric],
        "standard_error": numbers.get(metric.replace(",", "_stderr,")),
        "items": sum(results["n-samples"][single]["effective"] for single in _tasks_of_group(task, results)),
        "all": numbers,
    }


def _tasks_of_group(task: str, results: dict) -> Iterator[str]:
    """The tasks of a group and of the groups inside it. For a single task, the task itself."""
    if task in results["n-samples"]:
        yield task
    else:
        for part in results["group_subtasks"][task]:
            yield from _tasks_of_group(part, results)


def _evaluate(
    tasks: tuple[str, ...],
    data: TokenData,
    model,
    include: Path | None,
    batch_size: int,
    limit: int | None,
    num_fewshot: int | None = None,
    data_root: str = ".",
) -> dict:
    """lm-eval's results. `include`: a directory of task files, or None for lm-eval's own tasks.

    `data_root`: relative paths in the task files start here.
    """
    tokenizer = AutoTokenizer.from_pretrained(data.directory / "tokenizer")
    model = QuietHFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")
    manager = TaskManager(include_path=include and str(include.resolve()), include_defaults=include is None)
    with contextlib.chdir(data_root):
        return simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
        )
