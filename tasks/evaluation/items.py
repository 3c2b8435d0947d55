"""The items of an evaluation: a model and a group of scores. An item can be computed on any worker, alone."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os.path import abspath
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from elastic_core.data.loader import TokenData
from elastic_core.model.ops import transformers_kernels
from tasks.evaluation import latency_and_memory, text_scores
from tasks.evaluation.samples import samples
from tasks.evaluation.teacher import CachedTeacher
from tasks.settings.sections import Evaluate

TEACHER = "teacher"  # the item that computes what all others need of the parent


@dataclass(frozen=True)
class Item:
    """A group of scores of the model in a directory. `tasks`: of lm-eval. `needs`: names of items that come first."""

    name: str
    group: str
    directory: Path
    tasks: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """What all items share. `parent` is None for the parent itself; `states` is a directory or URL for `CachedTeacher`.

    `logs`: a directory of the worker for what other programs print.
    """

    section: Evaluate
    data: Path
    parent: Path | None
    states: str
    logs: Path


def list_items(
    section: Evaluate, versions: Mapping[str, Path], parent: Path | None, uniform: Path | None, split: bool
) -> list[Item]:
    """The items for the versions of a budget, in an order in which they can be computed one by one.

    All versions have one shape and so one speed: it is measured once, with the last version, after all other items,
    which would disturb it. `uniform`: a further model, of which only text is scored. `split`: an item for every task
    and benchmark, and not one for all.
    """
    found, last = [], list(versions)[-1]
    needs = () if parent is None else (TEACHER,)
    if parent is not None:
        found.append(Item(TEACHER, "teacher", parent))
    for version, directory in versions.items():
        found.append(Item(f"{version}-text", "text", directory, needs=needs))
        found.append(Item(f"{version}-memory", "memory", directory))
        tasks = {"tasks": section.tasks or (), "benchmarks": section.benchmarks.tasks if section.benchmarks else ()}
        for group, names in tasks.items():
            for names_of_item in [(name,) for name in names] if split else [tuple(names)] if names else []:
                label = f"-{'-'.join(names_of_item)}" if split else ""
                found.append(Item(f"{version}-{group}{label}", group, directory, names_of_item))
        if version == last:
            found.append(Item(f"{version}-samples", "samples", directory))
    if uniform is not None:
        found.append(Item("uniform-text", "uniform", uniform, needs=needs))
    others = tuple(item.name for item in found)
    return [*found, Item("speed", "speed", versions[last], needs=others)]


def element_type(dtype: str | None, on_gpu: bool) -> str:
    """The element type of the models: `evaluate.dtype`, or what suits the device."""
    return dtype or ("bfloat16" if on_gpu else "float32")


class Models:
    """Loads models on a device, one at a time: the next one takes the place of the one before.

    `dtype`: the element type; None is bfloat16 on a GPU and float32 on a CPU.
    """

    def __init__(self, device: torch.device, dtype: str | None):
        self.device = device
        self.dtype = getattr(torch, element_type(dtype, device.type == "cuda"))
        self._directory, self._model = None, None

    def load(self, directory: Path):
        """The transformers model of a directory."""
        if directory != self._directory:
            self.free()
            self._directory, self._model = directory, self.load_another(directory)
        return self._model

    def load_another(self, directory: Path):
        """The same, beside the one that is there. Heterogeneous models need remote code: their own modeling file."""
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=self.dtype, trust_remote_code=True)
        transformers_kernels.choose_by_device()
        return model.to(self.device).eval()

    def free(self) -> None:
        """Give the memory of the model back."""
        self._directory, self._model = None, None
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def compute(item: Item, setting: Setting, models: Models) -> dict:
    """The scores of an item."""
    section, data = setting.section, TokenData(setting.data)
    if item.group in ("tasks", "benchmarks"):
        return _task_scores(item, setting, data, models)
    model = models.load(item.directory)
    if item.group == "teacher":
        text_scores.write_teacher(section, data, model, setting.states)
        return {"states": setting.states}
    if item.group in ("text", "uniform"):
        teacher = None if setting.parent is None else CachedTeacher(setting.states, models.device)
        scores = text_scores.count_parameters(model) | text_scores.held_out_scores(section, data, model, teacher)
        at_lengths = {} if item.group == "uniform" else text_scores.scores_at_lengths(section, data, model)
        return scores | ({"lengths": at_lengths} if at_lengths else {})
    if item.group == "samples":
        return {"samples": samples(section, data, model)}

    def prompt(tokens: int) -> torch.Tensor:
        return text_scores.first_tokens(data, section.held_out[0], tokens).to(models.device)

    if item.group == "memory":
        return latency_and_memory.memory(model, prompt(section.cache_tokens))
    assert item.group == "speed", item
    # The parent is measured alternately with the model, so this is the one item with two models in memory.
    parent = None if setting.parent is None else models.load_another(setting.parent)
    latency = latency_and_memory.latency(section.latency, model, parent, prompt(section.latency.prompt_tokens))
    return {"latency": latency, "environment": latency_and_memory.environment(models.device)}


def _task_scores(item: Item, setting: Setting, data: TokenData, models: Models) -> dict:
    from tasks.evaluation import lm_eval_tasks  # slow
    from tasks.evaluation.lm_eval_model import Served
    from tasks.evaluation.vllm_engine import VllmEngine

    # Absolute paths: lm-eval works in the directory of its data.
    section, started, directory, logs = setting.section, [], item.directory.absolute(), setting.logs.absolute()
    vllm = section.vllm if section.vllm.python is None else replace(section.vllm, python=abspath(section.vllm.python))

    def engine() -> VllmEngine:
        models.free()  # vLLM has a copy of its own
        dtype = str(models.dtype).removeprefix("torch.")
        started.append(VllmEngine(vllm, directory, dtype, logs / f"{item.name}.vllm.log"))
        return started[0]

    if section.backend == "vllm":
        model = Served(directory, lambda: models.load(directory), engine)
    else:
        model = models.load(item.directory)
    try:
        if item.group == "tasks":
            return lm_eval_tasks.reasoning_scores(section, data, model, item.tasks)
        return lm_eval_tasks.benchmark_scores(section.benchmarks, data, model, item.tasks)
    finally:
        for process in started:
            process.close()
