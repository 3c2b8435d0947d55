"""lm-eval: the reasoning tasks that come with the data, and any tasks of its kind that a profile names."""

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from elastic_core.config import require
from elastic_core.data.loader import TokenData

if TYPE_CHECKING:
    from tasks.settings import params

METRICS = ("acc_norm", "acc", "exact_match")  # the one that is shown of a task; of another's, the first
NAME = re.compile(r"^(?:task|group):[ \t]*[\"']?([\w./][\w./-]*)", re.MULTILINE)
RESAMPLES = 1000  # for the standard error of what has no formula


@dataclass(frozen=True)
class Benchmarks:
    """Section `evaluate.benchmarks`: tasks of lm-eval, and the first `limit` items of each (None: all)."""

    tasks: tuple[str, ...]
    include: str | None = None  # a directory of task files; None: the tasks that come with lm-eval, data from the hub
    data_root: str = "."  # where relative paths inside those files start
    limit: int | None = None
    num_fewshot: int | None = None  # None: as the task has it
    batch_size: int = 8

    def check(self) -> None:
        require(bool(self.tasks), "tasks", self.tasks, "one or more; or benchmarks: null")
        require(len(set(self.tasks)) == len(self.tasks), "tasks", self.tasks, "every task once")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "1 or more, or null")
        require(self.num_fewshot is None or self.num_fewshot >= 0, "num_fewshot", self.num_fewshot, "0 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")

    def check_is_here(self, where: str) -> None:
        """Raise ConfigError for directories that are not there and tasks that no file in `include` has."""
        require(Path(self.data_root).is_dir(), f"{where}.data_root", self.data_root, "a directory")
        if self.include is not None:
            require(
                Path(self.include).is_dir(), f"{where}.include", self.include, "a directory of lm-eval's task files"
            )
            texts = (path.read_text() for path in sorted(Path(self.include).rglob("*.yaml")))
            known = sorted({name for text in texts for name in NAME.findall(text)})
            for task in self.tasks:
                require(task in known, f"{where}.tasks", task, f"{', '.join(known)} (files in {self.include})")


def reasoning_scores(section: "params.Evaluate", data: TokenData, model) -> dict:
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
