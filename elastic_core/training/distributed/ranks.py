"""The processes of a run (ranks), and the messages between them."""

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
    """This process (`rank`), the number of processes (`world`), and the device of this one.

    The default is a single process. `host_group` is the process group for tensors and objects in CPU memory. All ranks
    have to call a method that sends messages together and in the same order.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    host_group: dist.ProcessGroup | None = None

    @classmethod
    def current(cls, use_gpu: bool = False) -> Ranks:
        """This process according to torch.distributed; a single process if torch.distributed is not initialised.

        With `use_gpu`, the device is the GPU of the local rank.
        """
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
        """A further group of all ranks for messages in CPU memory; None for a single process."""
        return dist.new_group(backend="gloo") if self.is_distributed else None

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.is_distributed:
            dist.barrier(group=self.host_group)

    def all_arrive_within(self, seconds: float) -> bool:
        """Wait until all ranks have called this, at most `seconds`; return whether they have.

        It can be called once per process group.
        """
        if not self.is_distributed:
            return True
        # This counts arrivals in the process group's store. A message would hang if other ranks wait for another one.
        store, deadline = dist.distributed_c10d._get_default_store(), time.monotonic() + seconds
        store.add("all_arrive_within", 1)
        while store.add("all_arrive_within", 0) < self.world and time.monotonic() < deadline:
            time.sleep(0.1)
        return store.add("all_arrive_within", 0) >= self.world

    def is_first_on_node(self) -> bool:
        """Whether this is the first rank on its machine. All ranks have to call it together."""
        return self.gather(socket.gethostname()).index(socket.gethostname()) == self.rank

    def sum(self, value: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place, and return it. It is on the device or in CPU memory."""
        if self.is_distributed:
            dist.all_reduce(value, group=self.host_group if value.device.type == "cpu" else None)
        return value

    def gather(self, value) -> list:
        """The `value` of every rank, in the order of ranks. A value is a small object that can be pickled."""
        if not self.is_distributed:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    @contextlib.contextmanager
    def first_only(self) -> Iterator[bool]:
        """A block in which only rank 0 works: it gets True, the others get False. All ranks wait for the end.

        If rank 0 raises a ValueError or an OSError (a full disk, for instance), every rank raises it. Otherwise the
        other ranks would wait for rank 0 in their next message.
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
        """Call `make` on rank 0 and return its result on every rank.

        If it raises a ValueError or an OSError, every rank raises it.
        """
        answer = [None, None]  # (result, error)
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

    def part(self, count: int, name: str = "batch_size", sharing: int = 1) -> slice:
        """The slice of `count` items that belongs to this rank; all ranks get the same number.

        `sharing` ranks in a row get the same items. Raises ConfigError, with `name` in its text, if the number of
        ranks, or of groups of sharing ranks, does not divide `count`.
        """
        groups, shared = self.world // sharing, "" if sharing == 1 else " per sequence"
        if count % groups:
            raise ConfigError(f"{name}: got {count}; allowed: multiples of the number of workers{shared} ({groups})")
        size = count // groups
        start = self.rank // sharing * size
        return slice(start, start + size)
