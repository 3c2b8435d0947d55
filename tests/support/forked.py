"""Run a function on several gloo ranks that are forked from this process: nothing is imported again."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from elastic_core.training.distributed.ranks import Ranks


def run_forked(function, world: int, directory: Path, *args):
    """The result of `function(ranks, *args)` on the first of `world` ranks. Files of the ranks are in `directory`."""
    mp.start_processes(_rank, (function, world, directory, args), nprocs=world, start_method="fork")
    return torch.load(directory / "result.pt", weights_only=False)


def _rank(rank: int, function, world: int, directory: Path, args) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory / 'store'}", rank=rank, world_size=world)
    result = function(Ranks.current(), *args)
    if rank == 0:
        torch.save(result, directory / "result.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # what this process would do at its end belongs to the process that it was forked from
