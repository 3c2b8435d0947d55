"""Many processes, one model: FSDP2 and what else is applied from outside, so that the model knows nothing of it.

Matrices are sharded per block; everything else (norms, the state space's A, D, dt and convolution, biases) is a tiny
part of the weights, stays whole in float32 on every rank, and is averaged like the router. A block that a microbatch
skips is neither gathered nor reduced, and all ranks skip the same ones, because they take the same budget.
"""

from __future__ import annotations

import torch
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

from elastic_core.config import ConfigError
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.distributed.ranks import Ranks

SHAPES_PER_LAYER = 32  # graphs that torch.compile may make of one layer's code


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
