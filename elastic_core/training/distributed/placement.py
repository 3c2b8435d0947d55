"""Many processes, one model: FSDP2 and what else is applied from outside, so that the model knows nothing of it.

Matrices are sharded per block; everything else (norms, the state space's A, D, dt and convolution, biases) is a tiny
part of the weights, stays whole in float32 on every rank, and is averaged like the router. A block that a microbatch
skips is neither gathered nor reduced, and all ranks skip the same ones, because they take the same budget.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from elastic_core.config import ConfigError, require
from elastic_core.model.elastic_model import ElasticModel

SHAPES_PER_LAYER = 32  # graphs that torch.compile may make of one layer's code


@dataclass(frozen=True)
class Execution:
    """How a model is held and run; none of it changes what is learnt beyond rounding.

    `shard_over`: how many workers share one copy of the weights (None: all); groups of so many hold copies and
    average gradients. `activation_checkpointing` keeps only each block's input and computes the rest again in the
    backward pass. `compile` runs the parts of each block through torch.compile, a graph per layer and shape.
    `offload_teacher` keeps a frozen teacher's shards in CPU memory.
    """

    activation_checkpointing: bool = False
    compile: bool = False
    offload_teacher: bool = False
    shard_over: int | None = None

    def check(self) -> None:
        require(self.shard_over is None or self.shard_over >= 1, "shard_over", self.shard_over, "null, or 1 or more")


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


def place(
    model: ElasticModel, ranks: Ranks, execution: Execution, precision: str, frozen: bool = False
) -> ElasticModel:
    """Make `model` (empty on the meta device, or whole in CPU memory) ready to run here, and return it.

    `precision` is a stage's: with bfloat16, matrices are gathered and multiplied in it, while their float32 master
    copies are what the optimizer moves. A frozen model has no master copies: its matrices are bfloat16 throughout.
    """
    empty = next(model.parameters()).is_meta
    if frozen:
        model.requires_grad_(False)
        if precision == "bfloat16":
            matrices_to_(model, torch.bfloat16)
    if execution.activation_checkpointing and not frozen:
        for block in model.model.layers:
            checkpoint(block, preserve_rng_state=False)
    if execution.compile:
        compile_blocks(model)
    offloaded = frozen and execution.offload_teacher and ranks.is_distributed
    if ranks.is_distributed:
        shard(model, ranks, execution.shard_over, precision, offloaded)
    home = torch.device("cpu") if offloaded else ranks.device
    if empty:
        model.to_empty(device=home)
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(ranks.device)
    return model


def is_matrix(parameter: Tensor) -> bool:
    """What is sharded and multiplied in low precision: the weights of embeddings, projections, experts and head.

    Of three dimensions there is also a convolution's kernel, which has 1 in the middle.
    """
    return parameter.dim() == 2 or (parameter.dim() == 3 and parameter.shape[1] > 1)


def matrices_to_(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the matrices in `dtype`, in place."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if is_matrix(parameter):
                module.register_parameter(name, nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad))


def shard(model: ElasticModel, ranks: Ranks, shard_over: int | None, precision: str, offloaded: bool) -> None:
    """FSDP2: a group per block, and one for embeddings and head.

    The head is read after `hidden_states` has returned; the root's weights stay gathered until the backward pass.
    """
    policy = MixedPrecisionPolicy()
    if precision == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {
        "mesh": make_mesh(ranks, shard_over),
        "mp_policy": policy,
        "offload_policy": CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda") if offloaded else OffloadPolicy(),
        "ignored_params": {parameter for parameter in model.parameters() if not is_matrix(parameter)},
    }
    for block in model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "hidden_states")


def make_mesh(ranks: Ranks, shard_over: int | None) -> DeviceMesh:
    """All ranks in one row that shares a copy of the weights, or in rows of `shard_over` with a copy each."""
    size = shard_over or ranks.world
    if ranks.world % size:
        raise ConfigError(f"shard_over: got {size}; allowed: divisors of the number of workers ({ranks.world})")
    if size == ranks.world:
        return init_device_mesh(ranks.device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(ranks.device.type, (ranks.world // size, size), mesh_dim_names=("replicate", "shard"))


def compile_blocks(model: ElasticModel) -> None:
    """Compile every block's parts one by one: the hooks of sharding and recomputation sit on the blocks around them.

    Every layer meets a shape per budget, the full one (the teacher's too) and the router's soft mode, with and
    without gradients; at torch's limit of 8 graphs per function the rest would silently run uncompiled.
    """
    limit = SHAPES_PER_LAYER * len(model.model.layers)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 4 * limit)
    for block in model.model.layers:
        for part in block.children():
            part.compile(dynamic=False)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its shard, or all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from its shards; every rank has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def average_gradients(modules: Iterable[nn.Module], ranks: Ranks) -> None:
    """Average what FSDP does not: gradients of whole parameters, which all ranks have for the same ones."""
    if not ranks.is_distributed:
        return
    buckets: dict[str, list[Tensor]] = {}
    for module in modules:
        for parameter in module.parameters():
            if parameter.grad is not None and not isinstance(parameter, DTensor):
                buckets.setdefault(parameter.device.type, []).append(parameter.grad)
    for gradients in buckets.values():
        flat = ranks.sum(torch.cat([gradient.flatten() for gradient in gradients])) / ranks.world
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of gradients together, of shards and whole ones, as a plain tensor."""
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    plain = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norms = [whole(nn.utils.get_total_norm(part)) for part in (sharded, plain) if part]
    if not norms:
        return torch.zeros(())
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def clip_gradients(gradients: list[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale gradients of 2-norm `norm` (see `gradient_norm`) down to `max_norm`, in place; without a wait for it."""
    if gradients:
        torch._foreach_mul_([local(gradient) for gradient in gradients], (max_norm / (norm + 1e-6)).clamp(max=1.0))
