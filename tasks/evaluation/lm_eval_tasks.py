"""Runs lm-eval: the reasoning tasks that are made with the data, and the benchmarks that a profile names."""

import contextlib
import dataclasses
import difflib
import logging
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets.exceptions import DatasetsError
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from jinja2 import TemplateError
from lm_eval import evaluate
from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from elastic_core.config import ConfigError
from elastic_core.data.loader import TokenData
from elastic_core.data.tokenizer import load_tokenizer
from tasks.corpora.benchmark_files import TaskFile, check_task_files
from tasks.evaluation.lm_eval_model import Model, Served
from tasks.settings.sections import Benchmarks, Evaluate

METRICS = ("acc_norm", "acc", "exact_match")  # a task shows the first of these that it has, else its first metric
# What lm-eval and the code of a task file raise for a task that cannot be made.
TASK_ERRORS = (
    *(ImportError, LookupError, TypeError, ValueError, AttributeError, OSError, AssertionError, NotImplementedError),
    *(ArithmeticError, RuntimeError, SyntaxError, NameError, DatasetsError, TemplateError),
)
RESAMPLES = 1000  # bootstrap, for the standard error of metrics without a formula


def reasoning_scores(section: Evaluate, data: TokenData, model, tasks: tuple[str, ...] | None = None) -> dict:
    """Task → exact match (0 to 1), its standard error, the exact match of guessing, and the number of items.

    `tasks`: of those of the section (None: all).
    """
    tasks = section.tasks if tasks is None else tasks
    if not tasks:
        return {}
    options = Benchmarks(tasks, limit=section.limit, batch_size=section.task_batch_size, apply_chat_template=True)
    results = _evaluate(options, data, model, _manager(data.directory / "lm_eval"))
    scores = {}
    for task in tasks:
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


def benchmark_scores(section: Benchmarks | None, data: TokenData, model, tasks: tuple[str, ...] | None = None) -> dict:
    """Task → the shown metric, its value, its standard error, the number of items, and all metrics.

    A group with an aggregate metric has one entry. A tag, and a group without an aggregate metric, have one entry for
    each of their tasks. The standard error is None if lm-eval has none. Returns {} for `section` None.

    `tasks`: of those of the section (None: all).
    """
    if section is None:
        return {}
    section = section if tasks is None else dataclasses.replace(section, tasks=tasks)
    manager = _manager(_include(section))
    results = _evaluate(section, data, model, manager)
    shown = [task for name in section.tasks for task in _shown(name, results, manager)]
    return {task: _summary(task, results) for task in dict.fromkeys(shown)}


def check_benchmark_tasks(
    section: Benchmarks | None, where: str = "evaluate.benchmarks", download: bool = False
) -> None:
    """Raise ConfigError unless lm-eval can score the tasks. No model is needed.

    It makes the tasks as for an evaluation: it reads their data and builds the prompt of the first item. Tasks of
    lm-eval itself have their data on the hub, so without `download` only their names are checked.
    `where` starts every message.
    """
    if section is None:
        return
    include = _include(section)
    if include is not None:
        leaves = check_task_files(include, section.tasks, Path(section.data_root), where)
        for leaf in leaves:
            _check_metrics(leaf)
    manager = _manager(include)
    for name in section.tasks:
        if manager.task_index.get(name) is None:
            similar = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; similar names: {', '.join(similar)}" if similar else ""
            raise ConfigError(f"{where}.tasks: got {name!r}, which lm-eval does not know{hint}")
    if include is None and not download:
        return
    with contextlib.chdir(section.data_root), _quiet():
        for name in section.tasks:
            try:
                tasks = manager.load([name])["tasks"]
            except TASK_ERRORS as error:
                file = manager.task_index[name].yaml_path or f"tag {name}"
                text = " ".join(str(error).split())
                raise ConfigError(f"{where}.tasks: {name} ({file}): {type(error).__name__}: {text}") from None
            for task, found in tasks.items() if section.enable_thinking else ():
                if found.OUTPUT_TYPE != "generate_until":
                    raise ConfigError(
                        f"{where}.enable_thinking: got true; allowed: null or false, because {task} generates no "
                        f"answer (output_type {found.OUTPUT_TYPE})"
                    )


def _check_metrics(leaf: TaskFile) -> None:
    """Raise ConfigError for a metric or aggregation that lm-eval does not have."""
    for metric in leaf.values.get("metric_list") or ():
        if not isinstance(metric, dict) or "metric" not in metric:
            raise ConfigError(f"{leaf.path}: metric_list: got {metric!r}; allowed: entries with a key `metric`")
        # A metric computed by `process_results` or by a function has any name; hf_evaluate takes it from the hub.
        is_named = type(metric["metric"]) is str and "process_results" not in leaf.values
        if is_named and not metric.get("hf_evaluate") and metric["metric"] not in METRIC_REGISTRY:
            raise ConfigError(
                f"{leaf.path}: metric {metric['metric']!r} of task {leaf.name}; allowed: {_known(METRIC_REGISTRY)}"
            )
        how = metric.get("aggregation")
        if type(how) is str and how not in AGGREGATION_REGISTRY:
            raise ConfigError(
                f"{leaf.path}: aggregation {how!r} of task {leaf.name}; allowed: {_known(AGGREGATION_REGISTRY)}"
            )


def _known(registry) -> str:
    return ", ".join(sorted(registry.keys()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of datasets, and none of lm-eval's lines about defaults that it takes."""
    logger, had_bars = logging.getLogger("lm_eval"), not are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if had_bars:
            enable_progress_bars()


def _shown(name: str, results: dict, manager: TaskManager) -> Iterator[str]:
    """The tasks and groups that are shown for a name of `tasks`: those that have metrics."""
    if name in results["results"] and _metrics(results["results"][name]):
        yield name
    elif name in results["group_subtasks"]:
        for part in results["group_subtasks"][name]:
            yield from _shown(part, results, manager)
    else:
        yield from sorted(manager.task_index[name].tags)


def _metrics(values: dict) -> dict[str, float]:
    """The metrics in lm-eval's values of a task or group, by "metric,filter"."""
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
    return {name: value for name, value in numbers.items() if "," in name and "_stderr," not in name}


def _summary(task: str, results: dict) -> dict:
    """The scores of one task or group out of lm-eval's results."""
    values = results["results"][task]
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
    metrics = _metrics(values)
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


def _include(section: Benchmarks) -> Path | None:
    return None if section.include is None else Path(section.include)


def _manager(include: Path | None) -> TaskManager:
    """lm-eval's index of the tasks in a directory, or of its own tasks, which takes some seconds."""
    return TaskManager(include_path=include and str(include.resolve()), include_defaults=include is None)


def _evaluate(section: Benchmarks, data: TokenData, model, manager: TaskManager) -> dict:
    """lm-eval's results for the tasks of a section. Relative paths in the task files start at its `data_root`.

    `model`: a transformers model, or `Served`, whose engine answers if all tasks are generative.

    Equal to those of lm-eval's `simple_evaluate`, which also describes the machine: it starts pip and more, for longer
    than a small evaluation takes.
    """
    tokenizer = load_tokenizer(data.directory / "tokenizer")
    as_turns = section.fewshot_as_multiturn
    # lm-eval would resample in forks of this process, whose threads do not live on in them: such a fork can hang.
    os.environ["DISABLE_MULTIPROC"] = "1"
    with contextlib.chdir(section.data_root):
        random.seed(DEFAULT_RANDOM_SEED)  # code of tasks may sample
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        loaded = manager.load(list(section.tasks))
        for task in loaded["tasks"].values():
            _set_options(task, section)
        generates = all(task.OUTPUT_TYPE == "generate_until" for task in loaded["tasks"].values())
        if isinstance(model, Served) and generates:
            adapter = Model(section, model.without_weights(), tokenizer, model.engine())
        else:
            adapter = Model(section, model.load() if isinstance(model, Served) else model, tokenizer)
        return evaluate(
            adapter,
            loaded,
            limit=section.limit,
            system_instruction=section.system_instruction,
            apply_chat_template=bool(section.apply_chat_template),
            fewshot_as_multiturn=bool(section.apply_chat_template) if as_turns is None else as_turns,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
        )


def _set_options(task, section: Benchmarks) -> None:
    """Give a task of lm-eval the options of a section. `num_fewshot: 0` in a task file stays."""
    if section.gen_kwargs and task.get_config("output_type") == "generate_until":
        task.set_config("generation_kwargs", _generation(section.gen_kwargs), update=True)
    given = task.get_config("num_fewshot")
    if given is None or (section.num_fewshot is not None and given != 0):
        task.set_config("num_fewshot", section.num_fewshot or 0)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)


def _generation(given: dict) -> dict:
    """`gen_kwargs` with `do_sample`, if they say by the temperature whether to sample: the task may say otherwise."""
    if "temperature" in given and "do_sample" not in given:
        return given | {"do_sample": given["temperature"] > 0}
    return dict(given)
