"""`python -m tests.support.cuda.cases NAME...`: runs cases on a GPU that is not there; prints what each did, as JSON.

A process of its own, because the GPU has to be pretended before torch is imported, for the whole process.
"""

# isort: skip_file
from tests.support.cuda.pretend import CUDA, Pretend, pretend_streams  # before torch

import dataclasses
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import NemotronHConfig

from elastic_core import rank, sort_
from elastic_core.data.loader import Batch
from elastic_core.export.nested import NestedModel
from elastic_core.model.ops.cross_entropy import chunked_cross_entropy
from elastic_core.model.ops.parts import Part
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.distributed.placement import autocast
from elastic_core.training.distributed.ranks import Ranks
from elastic_core.training.loop import NonFiniteError, train_step
from elastic_core.training.teacher_cache import TeacherCache
from tasks.evaluation.items import Models
from tasks.evaluation.teacher import CachedTeacher, write_head, write_states
from tasks.evaluation.text_scores import text_scores
from tasks.rank import load_parent
from tests.support.cuda.runs import fitting_moe, random_run, save_family, save_models
from tests.support.models.parents import (
    random_config,
    random_elastic,
    random_ids,
    random_llama_config,
    save_random_parent,
)

RANKS = Ranks(device=CUDA)
BIASES = {"use_bias": True, "mlp_bias": True}
CONFIGS = {  # the first has one Mamba layer, one of attention, and two MLPs; the last has two layers
    "nemotron": NemotronHConfig(**random_config(2).to_dict() | BIASES),
    "moe": fitting_moe(),
    "llama": random_llama_config(1),
}


def step(model: str, mode: str, precision: str, **values) -> Callable:
    def work(gpu: Pretend, directory: Path) -> None:
        save_models(directory, CONFIGS[model])
        run = random_run(directory, RANKS, mode, precision, **values)
        gpu.events.clear()
        train_step(run)
        assert run.step == 1 and not run.skipped

    return work


def part_of_rows(model: str, mode: str, precision: str) -> Callable:
    """A step of the second of two workers that share every sequence. The other one's part is as its own."""

    def work(gpu: Pretend, directory: Path) -> None:
        save_models(directory, CONFIGS[model])
        run = random_run(directory, RANKS, mode, precision, length=14)
        run.part = Part(1, 2, lambda x: torch.stack([x, x]))
        gpu.events.clear()
        train_step(run)
        assert run.step == 1 and not run.skipped

    return work


def cached_teacher(gpu: Pretend, directory: Path) -> None:
    """The teacher's logits are computed on the GPU; then a step without a teacher reads them."""
    save_models(directory, CONFIGS["nemotron"])
    run = random_run(directory, RANKS, "members", "bfloat16", teacher="cached")
    run.stage = dataclasses.replace(run.stage, kept_logits=4, steps=1)
    run.teacher_cache = TeacherCache(directory / "cache", run.data, run.stage, run.model.config.vocab_size)
    run.teacher_cache.make(lambda: run.teacher, RANKS, autocast("bfloat16", CUDA))
    run.teacher = run.frozen_teacher = None
    gpu.events.clear()
    train_step(run)
    assert run.step == 1 and not run.skipped


def not_finite(gpu: Pretend, directory: Path) -> None:
    """What is read from the GPU is not a number: the step is skipped, the next one explains it."""
    save_models(directory, CONFIGS["moe"])
    run = random_run(directory, RANKS, "soft", "bfloat16")
    gpu.read = float("nan")
    train_step(run)
    assert run.skipped == 1
    try:
        train_step(run)
    except NonFiniteError:
        return
    raise AssertionError("the second step was not refused")


def ranking(model: str, measure: str, method: str, precision: str = "float32") -> Callable:
    """Two layers are removed where they are removed one by one."""

    def work(gpu: Pretend, directory: Path) -> None:
        random_elastic(1, CONFIGS[model]).save_pretrained(directory / "parent")
        elastic = load_parent(directory / "parent", RANKS, precision)
        batches = [random_ids(elastic.config, seed, (2, 12)).to(CUDA) for seed in range(2)]
        gpu.events.clear()
        with autocast(precision, CUDA):
            num_layers = len(elastic.model.layers)
            found = rank(elastic, batches, measure=measure, depth_method=method, min_depth=max(1, num_layers - 2))
        assert all(value.device.type == "cpu" for value in [*found.scores.values(), *found.orders.values()])
        sort_(elastic, found)

    return work


def scores(gpu: Pretend, directory: Path) -> None:
    """Held-out cross-entropy of a slice."""
    elastic = random_elastic(1, CONFIGS["nemotron"]).to(CUDA)
    ids = random_ids(elastic.config, 0, (2, 12)).to(CUDA)
    gpu.events.clear()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        sliced = elastic.slice()
        hidden = elastic.hidden_states(ids, sliced).flatten(0, 1)
        assert chunked_cross_entropy(hidden, elastic.head(sliced), ids.flatten()).device == CUDA


def evaluation(gpu: Pretend, directory: Path) -> None:
    """Held-out text of stage evaluate: a model of transformers against the parent's states on disk."""
    batches = [Batch(ids[:, :-1], ids[:, 1:], None) for ids in (random_ids(CONFIGS["nemotron"], 0, (2, 13)),)]
    for name in ("parent", "model"):
        save_random_parent(directory / name, 0, CONFIGS["nemotron"])
    models = Models(CUDA, None)
    on_gpu = [Batch(*(t.to(CUDA, non_blocking=True) for t in batch[:2]), None) for batch in batches]
    parent = models.load(directory / "parent")
    write_head(parent, str(directory))
    write_states(parent, on_gpu, str(directory), "text", 12)
    teacher = CachedTeacher(str(directory), CUDA)
    given = teacher.states("text", 12), teacher.head
    text_scores(models.load(directory / "model"), given, on_gpu)


def nested(model: str) -> Callable:
    def work(gpu: Pretend, directory: Path) -> None:
        budgets = save_family(directory / "elastic", CONFIGS[model])
        found = NestedModel.from_pretrained(directory / "elastic", dtype=torch.bfloat16, device=CUDA)
        ids = random_ids(found.config, 0, (1, 9)).to(CUDA)
        for budget in budgets:
            assert found.generate(ids, budget, do_sample=False, max_new_tokens=2).device == CUDA

    return work


def planted(gpu: Pretend, directory: Path) -> None:
    """A fault of each kind, which has to be noticed."""
    tensor = torch.ones(4).to(CUDA, non_blocking=True)
    gpu.events.clear()
    tensor.sum().item()
    torch.ones(4).to(CUDA)
    tensor.cpu()
    try:
        tensor + torch.ones(4)
    except RuntimeError:
        return
    raise AssertionError("mixed devices were not refused")


CASES = {
    "planted": planted,
    "members bfloat16": step("nemotron", "members", "bfloat16", state_weight=0.5),
    "soft bfloat16": step("nemotron", "soft", "bfloat16"),
    "hard routing bfloat16": step("nemotron", "hard", "bfloat16"),
    "one document, recomputed": step(
        "nemotron", "members", "bfloat16", document=None, execution=Execution(activation_checkpointing=True)
    ),
    "trainable teacher float32": step("nemotron", "members", "float32", teacher="trainable"),
    "mixed teacher": step("nemotron", "members", "bfloat16", teacher="mixed"),
    "cached teacher": cached_teacher,
    "part of rows soft": part_of_rows("nemotron", "soft", "float32"),
    "part of rows hard routing": part_of_rows("llama", "hard", "bfloat16"),
    "moe members float32": step("moe", "members", "float32"),
    "moe soft float32": step("moe", "soft", "float32"),
    "moe members bfloat16": step("moe", "members", "bfloat16"),
    "moe soft bfloat16": step("moe", "soft", "bfloat16"),
    "llama members bfloat16": step("llama", "members", "bfloat16"),
    "llama soft float32": step("llama", "soft", "float32"),
    "not finite": not_finite,
    "rank by projection": ranking("nemotron", "projection", "iterative_nmse"),
    "rank by output": ranking("moe", "output_norm", "one_shot_nmse"),
    "rank llama": ranking("llama", "projection", "one_shot_perplexity"),
    "rank bfloat16": ranking("moe", "output_norm", "one_shot_nmse", "bfloat16"),
    "scores": scores,
    "evaluation": evaluation,
    "nested": nested("nemotron"),
    "nested llama": nested("llama"),
}


class Spied:
    """The calls of two functions of torch that are to be the right ones on a GPU."""

    def __init__(self):
        self.grouped, self.scores_kept = 0, []
        self._products, self._attention = F.grouped_mm, F.scaled_dot_product_attention
        F.grouped_mm, F.scaled_dot_product_attention = self.products, self.attention

    def products(self, *args, **keywords):
        self.grouped += 1
        return self._products(*args, **keywords)

    def attention(self, query, key, value, *args, **keywords):
        """A float32 call with fewer heads of keys than of queries stores all scores on a GPU."""
        if query.is_cuda and query.dtype == torch.float32 and query.shape[1] != key.shape[1]:
            self.scores_kept.append(list(query.shape))
        return self._attention(query, key, value, *args, **keywords)


def run(name: str) -> dict:
    spied, problem = Spied(), None
    with tempfile.TemporaryDirectory() as directory, Pretend() as gpu:
        try:
            CASES[name](gpu, Path(directory))
        except Exception:  # reported to the test, which fails
            problem = traceback.format_exc()
    F.grouped_mm, F.scaled_dot_product_attention = spied._products, spied._attention
    kinds = {kind: gpu.count(kind) for kind in ("mixed", "wait", "to host", "to device", "host scalar")}
    return {"problem": problem, "grouped": spied.grouped, "scores kept": spied.scores_kept, **kinds}


if __name__ == "__main__":
    sys.modules["mamba_ssm"] = sys.modules["causal_conv1d"] = None
    pretend_streams()
    print("RESULT", json.dumps({name: run(name) for name in sys.argv[1:] or CASES}), flush=True)
    os._exit(0)  # what torch would do at its end needs the GPU
