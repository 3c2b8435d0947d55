"""lm-eval: the reasoning tasks that come with the data, and any tasks of its kind that a profile names."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

from elastic_core.data.loader import TokenData
from tasks.settings.schema import Benchmarks, Evaluate

METRICS = ("acc_norm", "acc", "exact_match")  # the one that is shown of a task; of another's, the first
RESAMPLES = 1000  # for the standard error of what has no formula


def reasoning_scores(section: Evaluate, data: TokenData, model) -> dict:
    """Exact match and its standard error of every reasoning task; chance comes along."""
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
    """By task: the metric that is shown, its value, its standard error where lm-eval knows one, items, all metrics."""
    if section is None:
        return {}
    include = None if section.include is None else Path(section.include)
    results = _evaluate(
        section.tasks, data, model, include, section.batch_size, section.limit, section.num_fewshot, section.data_root
    )
    return {task: _summary(task, results) for task in section.tasks}


def _summary(task: str, results: dict) -> dict:
    values = results["results"][task]
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
    metrics = {name: value for name, value in numbers.items() if "," in name and "_stderr," not in name}
    names = {name.partition(",")[0]: name for name in reversed(metrics)}  # of several filters the first
    name = next((name for name in METRICS if name in names), next(reversed(names)))
    metric = names[name]
    return {
        "metric": name,
        "value": metrics[metric],
        "standard_error": numbers.get(metric.replace(",", "_stderr,")),
        "items": sum(results["n-samples"][leaf]["effective"] for leaf in _leaves(task, results)),
        "all": numbers,
    }


def _leaves(task: str, results: dict) -> Iterator[str]:
    """The tasks of a group, or the task itself."""
    if task in results["n-samples"]:
        yield task
    else:
        for part in results["group_subtasks"][task]:
            yield from _leaves(part, results)


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
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data.directory / "tokenizer")
    model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")
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
