"""This process among the others of a run, and the messages between them."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_core.config import ConfigError


@dataclass(frozen=True)
class Ranks:
    """This process among the others: its number, how many there are, and its device.

    The default is a process on its own. `host_group` serves tensors and objects in CPU memory.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    host_group: dist.ProcessGroup | None = None

    @classmethod
    def current(cls, use_gpu: bool = False) -> Ranks:
        """As torch.distributed says, once it is initialised; with `use_gpu`, on the GPU of this local rank."""
        device = torch.device("cpu")
        if use_gpu:
            local = torch.cuda.current_device() if dist.is_initialized() else int(os.environ.get("LOCAL_RANK", 0))
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            return cls(device=device)
        return cls(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo"))

    @property
    def is_distributed(self) -> bool:
        return self.host_group is not None

    def new_group(self) -> dist.ProcessGroup | None:
        """Another group of all ranks for messages in CPU memory; None for a process on its own."""
        return dist.new_group(backend="gloo") if self.is_distributed else None

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.is_distributed:
            dist.barrier(group=self.host_group)

    def everybody_comes(self, seconds: float) -> bool:
        """Whether all ranks call this, once in a process group's life, within so many seconds of each other."""
        if not self.is_distributed:
            return True
        # By the store, not by a message: the others may be waiting for another one.
        store, deadline = dist.distributed_c10d._get_default_store(), time.monotonic() + seconds
        store.add("everybody_comes", 1)
        while store.add("everybody_comes", 0) < self.world and time.monotonic() < deadline:
            time.sleep(0.1)
        return store.add("everybody_comes", 0) >= self.world

    def leads_node(self) -> bool:
        """Whether this is the first of the ranks on its machine."""
        return self.gather(socket.gethostname()).index(socket.gethostname()) == self.rank

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, in place, of a tensor on the device or in CPU memory."""
        if self.is_distributed:
            dist.all_reduce(value, group=self.host_group if value.device.type == "cpu" else None)
        return value

    def gather(self, value) -> list:
        """Every rank's `value`, a small picklable object, on every rank."""
        if not self.is_distributed:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[bool]:
        """A block of which only rank 0 does the work (it is given True); all wait, and its error is everybody's.

        That is one which its user can mend, a full disk for instance. An error of one rank alone would leave the
        others waiting for it in their next message.
        """
        problem = None
        try:
            yield self.rank == 0
        except (ValueError, OSError) as error:
            problem = error
        found = self.gather(problem)[0]
        if found is not None:
            raise problem or found

    def from_first(self, make: Callable[[], object]):
        """What `make()` returns on rank 0, on every rank; an error that its user can mend is everybody's too."""
        answer = [None, None]  # value, error
        if self.rank == 0:
            try:
                answer[0] = make()
            except (ValueError, OSError) as error:
                answer[1] = error
        if self.is_distributed:
            dist.broadcast_object_list(answer, src=0, group=self.host_group)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def part(self, count: int, name: str = "batch_size") -> slice:
        """This rank's equal part of `count` items; ConfigError where they cannot be shared out equally."""
        if count % self.world:
            raise ConfigError(f"{name}: got {count}; allowed: multiples of the number of workers ({self.world})")
        size = count // self.world
        return slice(self.rank * size, (self.rank + 1) * size)
