"""Runs of every routing mode on tiny random models, on any device: for the tests of the CUDA path.

A microbatch each of the full model and of a budget that lacks the last layer: every operation on a pretended GPU costs
a millisecond, so there are no more microbatches, and models have few layers.
"""

import dataclasses
from pathlib import Path

import torch
from transformers import NemotronHConfig

from benchmarks.shapes import RandomTokens
from elastic_core import Submodel
from elastic_core.data.loader import Batch
from elastic_core.export import elastic_checkpoint
from elastic_core.model import architectures
from elastic_core.model.axes import FIELDS
from elastic_core.model.hf import read_config
from elastic_core.search.choices import Choices
from elastic_core.search.router import Router
from elastic_core.search.selection import Member
from elastic_core.search.space import ElasticSpace
from elastic_core.training.distributed import model_files
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.distributed.ranks import Ranks
from elastic_core.training.run import Run
from elastic_core.training.stage import Loss, Routing, Stage
from tests.support.models.parents import random_elastic, random_submodel, save_random_parent

BUDGETS = {"full": 1.0, "small": 0.5}


@dataclasses.dataclass(frozen=True)
class Tokens(RandomTokens):
    """Random tokens, with the names of sources that a diagnosis asks for."""

    sources = ("random",)

    def source_indices(self, first: int, count: int) -> list[int]:
        return [0] * count

    def rows(self, first: int, count: int) -> list[tuple[int, int]]:
        return [(0, first + number) for number in range(count)]

    def batch_of_rows(self, rows: list[tuple[int, int]]) -> Batch:
        batches = [self.batch(row, 1) for _, row in rows]
        return Batch(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))


def save_models(directory: Path, config) -> None:
    """A model and another one as its teacher."""
    for seed, name in enumerate(("model", "teacher")):
        random_elastic(seed, config).save_pretrained(directory / name)


def random_run(
    directory: Path,
    ranks: Ranks,
    mode: str,
    precision: str = "float32",
    teacher: str = "frozen",
    microbatches: int = 2,
    length: int = 13,
    document: int | None = 7,
    execution: Execution = Execution(),  # noqa: B008 (frozen)
    **loss: float,
) -> Run:
    """A run of the models in `directory`. `mode`: members (a settled family), soft or hard (a router that learns)."""

    def load(name: str, frozen: bool = False):
        return model_files.from_pretrained(directory / name, ranks, execution, precision, frozen)

    model = load("model")
    config = model.config
    stage = Stage(
        length, 2 * microbatches, steps=100, learning_rate=1e-3, mixture={"random": 1.0}, microbatches=microbatches,
        loss=Loss(**{"ce_weight": 0.5} | loss), precision=precision, teacher=teacher, max_skipped_steps=1,
    )  # fmt: skip
    data = Tokens(config.vocab_size, length, document)
    frozen = None if teacher == "trainable" else load("teacher", frozen=True)
    if mode == "members":
        all_but_one = tuple(range(architectures.num_layers(config) - 1))
        submodels = [Submodel(), dataclasses.replace(random_submodel(config, 5), kept_layers=all_but_one)]
        chosen = {
            name: Member(target, submodel.resolve(config))
            for (name, target), submodel in zip(BUDGETS.items(), submodels, strict=True)
        }
        return Run(model, stage, data, BUDGETS, chosen, None, Routing(), frozen, ranks=ranks)
    router = Router(
        ElasticSpace(config, halves(config), range(architectures.num_layers(config))), tuple(BUDGETS.values())
    )
    return Run(model, stage, data, BUDGETS, None, router, Routing(mode=mode), frozen, ranks=ranks)


def halves(config) -> Choices:
    """For every axis, the parent's size and about half of it; MLPs choose layer by layer."""
    sizes = {}
    for unit in architectures.units(config).values():
        axis = unit.key.split(".")[0]
        smaller = max(unit.least, unit.size // 2 // unit.groups * unit.groups, unit.groups)
        if axis == "hidden" and config.model_type != "nemotron_h":
            smaller = max(1, smaller // config.num_attention_heads) * config.num_attention_heads
        if config.model_type == "nemotron_h" and axis == "expert_ffn":
            smaller = unit.size
        sizes[FIELDS.get(axis, axis)] = tuple(dict.fromkeys((unit.size, smaller)))
    layers = architectures.num_layers(config)
    per_layer = ("intermediate_size",) if "intermediate_size" in sizes else ()
    return Choices(**sizes, depth=(layers, layers - 1), heterogeneous=per_layer)


def fitting_moe() -> NemotronHConfig:
    """A hybrid with all kinds of layers, in sizes that the GPU's kernels take, whole and halved."""
    return NemotronHConfig(
        vocab_size=64,
        hidden_size=32,
        layers_block_type=["mamba", "moe", "full_attention", "mlp"],
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        ssm_state_size=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=2,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        conv_kernel=4,
    )


def save_family(directory: Path, config) -> list[str]:
    """An elastic checkpoint of a random parent with two budgets; returns their names."""
    save_random_parent(directory, 0, config)
    config = read_config(directory)
    budgets = {"full": Submodel().resolve(config), "small": random_submodel(config, 1, all_layers=True).resolve(config)}
    elastic_checkpoint.write(directory, config, {name: Member(1.0, s) for name, s in budgets.items()}, [])
    return list(budgets)
