"""Place a model on the workers: sharding by FSDP2, activation checkpointing and torch.compile.

All of this is applied from outside: the model's own code contains no parallelism.

Matrices are sharded, one FSDP group per block. Everything else (norms, biases, and the A, D, dt and convolution of
Mamba layers) is a tiny part of the weights. It stays whole in float32 on every rank, and its gradients are averaged
like those of the router. If a microbatch skips a block, FSDP neither gathers the block's weights nor reduces its
gradients. This is safe because all ranks train the same budget in the same microbatch, so they skip the same blocks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from elastic_core.config import ConfigError
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.model.ops import kernels
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.distributed.ranks import Ranks

GRAPHS_PER_LAYER = 32  # the most graphs that torch.compile may make of one layer's code


def place(
    model: ElasticModel, ranks: Ranks, execution: Execution, precision: str, frozen: bool = False
) -> ElasticModel:
    """Make `model` ready to run on `ranks.device`, in place, and return it.

    The model is empty on the meta device, or whole in CPU memory. `precision` is that of the stage. With bfloat16,
    matrices are gathered and multiplied in bfloat16, and the optimizer updates float32 master weights. A frozen model
    needs no master weights: its matrices are stored in bfloat16. Raises ConfigError if `execution.shard_over` does not
    divide the number of workers.
    """
    if execution.deterministic:
        make_deterministic(ranks.device)
    empty = next(model.parameters()).is_meta
    if frozen:
        model.requires_grad_(False)
        if precision == "bfloat16":
            matrices_to_(model, torch.bfloat16)
    if execution.activation_checkpointing and not frozen:
        for block in model.model.layers:
            checkpoint(block, preserve_rng_state=False)
    if execution.compile:
        if ranks.device.type == "cuda":
            kernels.look_up()
        compile_blocks(model)
    offloaded = (execution.offload_teacher if frozen else execution.offload_student) and ranks.is_distributed
    if ranks.is_distributed:
        shard(model, ranks, execution.shard_over, precision, offloaded)
    storage_device = torch.device("cpu") if offloaded else ranks.device
    if empty:
        model.to_empty(device=storage_device)
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(ranks.device)
    return model


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """The context in which a model computes in `precision`. Norms and the state space scan stay in float32."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def make_deterministic(device: torch.device) -> None:
    """Take deterministic operations from now on, in this process, where there is a choice: on GPUs.

    Call it before the first operation on the GPU and before mamba_ssm is imported, which then has one configuration for
    each of its kernels: which one is the fastest is measured in every process, and another one sums in another order.
    An operation that has no deterministic version runs, with a warning.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def is_matrix(parameter: Tensor) -> bool:
    """Whether a parameter is sharded and multiplied in the stage's precision.

    These are the weights of embeddings, projections, experts and head. A convolution's kernel also has three
    dimensions, but it is not a matrix: its second dimension is 1.
    """
    return parameter.dim() == 2 or (parameter.dim() == 3 and parameter.shape[1] > 1)


def matrices_to_(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the matrices of `model` to `dtype`, in place."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if is_matrix(parameter):
                module.register_parameter(name, nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad))


def shard(model: ElasticModel, ranks: Ranks, shard_over: int | None, precision: str, offloaded: bool) -> None:
    """Apply FSDP2: one group per block, and one, the root, for embeddings and head.

    The loss reads the head after `hidden_states` has returned. This works because FSDP keeps the root's weights
    gathered until the backward pass.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.float32)  # a frozen model may hold its matrices in a 16-bit type
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


def reduce_in_last(model: ElasticModel, kept: Sequence[Collection[int]], microbatch: int) -> None:
    """Make the next backward pass reduce the gradients of those blocks that no later microbatch of the step runs.

    `kept` has the layers that each microbatch of the step runs. The gradients of other blocks, and of embeddings and
    head before the last microbatch, stay whole on every rank and are added up.
    """
    later = set().union(*kept[microbatch + 1 :])
    for layer, block in enumerate(model.model.layers):
        block.set_requires_gradient_sync(layer not in later, recurse=False)
    model.set_requires_gradient_sync(microbatch == len(kept) - 1, recurse=False)


def gather_root(model: nn.Module) -> None:
    """Gather embeddings and head of a sharded model. They stay gathered, so code outside of a pass can read them."""
    if isinstance(model, FSDPModule):
        model.unshard()


def reshard(model: nn.Module) -> None:
    """Free what forward passes without a backward pass have gathered: the model then has its shards as parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def make_mesh(ranks: Ranks, shard_over: int | None) -> DeviceMesh:
    """The device mesh: one group of all ranks that share a copy of the weights, or groups of `shard_over` ranks.

    Raises ConfigError if `shard_over` does not divide the number of ranks.
    """
    size = shard_over or ranks.world
    if ranks.world % size:
        raise ConfigError(f"shard_over: got {size}; allowed: divisors of the number of workers ({ranks.world})")
    if size == ranks.world:
        return init_device_mesh(ranks.device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(ranks.device.type, (ranks.world // size, size), mesh_dim_names=("replicate", "shard"))


def compile_blocks(model: ElasticModel) -> None:
    """Compile the parts of every block, not the block: FSDP and activation checkpointing put their hooks on the block.

    torch.compile makes a graph for every shape of a layer: one per budget, the full one (also the teacher's), and that
    of the soft mode, each with and without gradients. torch allows 8 graphs per function by default, and further shapes
    run uncompiled without a warning. So the limit is raised. What depends on the number of documents in a batch is not
    compiled (see `Documents.uncompiled`), so that batches with other documents use the same graphs.
    """
    limit = GRAPHS_PER_LAYER * len(model.model.layers)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 4 * limit)
    for block in model.model.layers:
        for part in block.children():
            part.compile(dynamic=False)
