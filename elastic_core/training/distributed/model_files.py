"""Load and save a sharded model: every rank reads only the rows of its own shards; rank 0 writes the whole model."""

from __future__ import annotations

import os

import torch
from torch.distributed.tensor import DTensor

from elastic_core.model.elastic_model import ElasticModel
from elastic_core.model.hf import TensorReader
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.distributed.gradients import local, whole
from elastic_core.training.distributed.placement import is_matrix, matrices_to_, place
from elastic_core.training.distributed.ranks import Ranks


def from_pretrained(
    directory: str | os.PathLike,
    ranks: Ranks,
    execution: Execution,
    precision: str = "float32",
    frozen: bool = False,
    as_stored: bool = False,
) -> ElasticModel:
    """Load a model directory and place the model (see `placement.place`).

    Each rank reads only the rows of its own shards. With `as_stored`, a sharded model that computes in float32 holds
    its matrices in the 16-bit type of the files, if all of them have it. They are converted when they are gathered.
    """
    model, reader = ElasticModel.empty(directory)
    if as_stored and ranks.is_distributed:
        matrices_to_(model, stored_type(model, reader))
    place(model, ranks, execution, precision, frozen)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, DTensor):
                parameter.copy_(reader.read(name))
            elif local(parameter).numel():  # With many ranks, the last ranks may have an empty shard.
                local(parameter).copy_(reader.read(name, own_rows(parameter)))
    return model


def stored_type(model: ElasticModel, reader: TensorReader) -> torch.dtype:
    """The type in which files have the matrices of a model: a 16-bit type if all of them have it, else float32."""
    names = (name for name, parameter in model.named_parameters() if is_matrix(parameter))
    found = {reader.stored(name).entry.dtype for name in names}
    return found.pop() if len(found) == 1 and max(dtype.itemsize for dtype in found) == 2 else torch.float32


def own_rows(parameter: DTensor) -> slice:
    """The rows of a sharded matrix that this rank holds. FSDP splits the first dimension as torch.chunk does."""
    mesh, rows = parameter.device_mesh["shard"], parameter.shape[0]
    start = min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)
    return slice(start, start + local(parameter).shape[0])


def save_pretrained(model: ElasticModel, directory: str | os.PathLike, ranks: Ranks, tokenizer_from=None) -> None:
    """Save a placed model as a model directory. Tensors are gathered one by one, and rank 0 writes them.

    All ranks have to call this together. Raises the error of rank 0 (a full disk, for instance) on every rank.
    """
    parameters = dict(model.named_parameters())
    tensors = ((name, whole(parameters[name].detach()).cpu()) for name in model.layout)
    with ranks.first_only() as is_first:  # No rank continues before the directory is complete.
        try:
            if is_first:
                model.write(directory, tensors, tokenizer_from)
        finally:
            # To gather a tensor, every rank has to ask for it. So the other ranks run through the generator too, and
            # rank 0 finishes it even if writing has failed.
            for _ in tensors:
                pass
