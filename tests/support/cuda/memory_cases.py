"""`python -m tests.support.cuda.memory_cases [kernels] [full]`: the memory of a step on GPUs that are not there.

A step of one of 64 ranks, on fake tensors in the shapes of Nemotron-Nano-12B-v2, with FSDP in a fake process group; of
its 62 layers only four, of all kinds, and without kernels at half the length, because that takes seconds and not
minutes. MemTracker of torch counts storages.
Prints what `elastic plan` says and what was counted, in bytes, by stage, as JSON. `kernels`: with mamba_ssm's own
Python, but without its launches. `full`: all 62 layers, at full length.
"""

# isort: skip_file
import sys

from tests.support.cuda.pretend import CUDA, Pretend, pretend_streams  # before torch
from tests.support.cuda import conv_stand_in, no_launch

import copy
import dataclasses
import json
import os

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # registers them
import torch.nn.functional as F
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.shapes import RandomTokens
from elastic_core import ElasticModel, Submodel
from elastic_core.model.architectures import pattern
from elastic_core.search.router import Router
from elastic_core.search.selection import Member
from elastic_core.search.space import ElasticSpace
from elastic_core.training.distributed.placement import place
from elastic_core.training.distributed.ranks import Ranks
from elastic_core.training.loop import train_step
from elastic_core.training.run import Run, state_tensors
from tasks.commands.plan import read_parent
from tasks.commands.plan_stages import stage_peak, total_with_kernels
from tasks.settings.load import read
from tasks.settings.merging import parameters

PROFILE, WORLD, LAYERS = "nemotron-nano-12b-v2", 64, 4
# A layer with a scan still takes most, and a scan has several blocks of 32 chunks. With kernels, no chunks are run.
SHORTER = ("train_extended.sequence_length=24576",)
BUDGETS = {"full": 1.0, "small": 0.5}


class Tracker(MemTracker):
    """Without the hooks by module, which allow one call of a module in a step."""

    def _pre_fw_hook(self, *args):
        pass

    _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pre_fw_hook


def flash_attention(query, key, value, is_causal=False, enable_gqa=False, **keywords):
    """The kernel that a GPU takes for 16-bit types."""
    if query.device.type == "cuda" and query.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]
    return _attention(query, key, value, is_causal=is_causal, enable_gqa=enable_gqa, **keywords)


_attention, F.scaled_dot_product_attention = F.scaled_dot_product_attention, flash_attention


def few_layers(config, settings):
    """Configuration and settings of a parent with the layers M, -, * and - only."""
    config = copy.deepcopy(config)
    config.layers_block_type = [config.layers_block_type[i] for i in (0, 1, 7, 8)]
    assert pattern(config) == "M-*-"
    choices = dataclasses.replace(settings.choices, depth=(LAYERS, LAYERS - 1))
    return config, dataclasses.replace(settings, choices=choices)


def make_run(config, settings, name: str, ranks: Ranks) -> Run:
    """The run of a stage, with two microbatches of the budget that takes most."""
    stage = getattr(settings, name)
    budget = "small" if name == "train_short" else "full"
    sequences = stage.batch_size // stage.microbatches
    shares = dict.fromkeys(BUDGETS, 0.0) | {budget: 1.0}
    stage = dataclasses.replace(
        stage, budget_shares=shares, microbatches=2, batch_size=2 * sequences, loss_by_budget={}, steps=100
    )

    def model(frozen: bool) -> ElasticModel:
        with torch.device("meta"):
            empty = ElasticModel(config)
        return place(empty, ranks, settings.compute.execution, stage.precision, frozen)

    placed, teacher = model(False), model(True)
    data = RandomTokens(config.vocab_size, stage.sequence_length)
    if name == "train_short":
        order = tuple(range(config.num_hidden_layers))
        router = Router(ElasticSpace(config, settings.choices, order), tuple(BUDGETS.values()))
        return Run(placed, stage, data, BUDGETS, None, router, settings.routing, teacher, ranks=ranks)
    members = {name: Member(target, Submodel()) for name, target in BUDGETS.items()}
    return Run(placed, stage, data, BUDGETS, members, teacher=teacher, ranks=ranks)


def count(config, settings, name: str, ranks: Ranks) -> dict:
    with Pretend():
        run = make_run(config, settings, name, ranks)
        state_tensors(run)  # the optimizer's moments, as from the second step on
        tracker = Tracker()
        tracker.track_external(run.model, run.teacher, run.optimizer)
        with tracker:
            train_step(run)
        counted = tracker.get_tracker_snapshot("peak")[CUDA]["Total"]
    peak = stage_peak(name, settings, config)
    with_kernels = total_with_kernels(name, settings, config)
    return {"planned": peak.total, "with kernels": with_kernels, "counted": counted, "moment": peak.moment}


def main(with_kernels: bool, is_full: bool) -> None:
    if with_kernels:
        conv_stand_in.install(computes=False)
        no_launch.load()
    else:
        sys.modules["mamba_ssm"] = sys.modules["causal_conv1d"] = None
    pretend_streams()
    settings = read(parameters(PROFILE, overrides=() if is_full or with_kernels else SHORTER), f"profile {PROFILE}")
    config, _ = read_parent(settings)
    if not is_full:
        config, settings = few_layers(config, settings)
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    ranks = Ranks(0, WORLD, CUDA, dist.new_group(backend="fake"))
    assert settings.compute.workers == WORLD
    names = ("train_extended",) if with_kernels else ("train_short", "train_extended")
    print("RESULT", json.dumps({name: count(config, settings, name, ranks) for name in names}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main("kernels" in sys.argv, "full" in sys.argv)
