"""A placed model from and to its directory: every rank reads its own rows, and rank 0 writes what all of them hold."""

from __future__ import annotations

import os

import torch
from torch.distributed.tensor import DTensor

from elastic_core.model.elastic_model import ElasticModel
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.distributed.gradients import local, whole
from elastic_core.training.distributed.placement import place
from elastic_core.training.distributed.ranks import Ranks


def from_pretrained(
    directory: str | os.PathLike, ranks: Ranks, execution: Execution, precision: str = "float32", frozen: bool = False
) -> ElasticModel:
    """`ElasticModel.from_pretrained`, placed: each rank reads its own shards' rows and no others."""
    model, reader = ElasticModel.empty(directory)
    place(model, ranks, execution, precision, frozen)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, DTensor):
                parameter.copy_(reader.read(name))
            elif local(parameter).numel():  # with many ranks the last ones may have none
                local(parameter).copy_(reader.read(name, own_rows(parameter)))
    return model


def own_rows(parameter: DTensor) -> slice:
    """Which rows of a sharded matrix are here: FSDP cuts the first dimension as torch.chunk does."""
    mesh, rows = parameter.device_mesh["shard"], parameter.shape[0]
    start = min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)
    return slice(start, start + local(parameter).shape[0])


def save_pretrained(model: ElasticModel, directory: str | os.PathLike, ranks: Ranks, tokenizer_from=None) -> None:
    """`ElasticModel.save_pretrained` of a placed model: gathered tensor by tensor, written by rank 0."""
    parameters = dict(model.named_parameters())
    tensors = ((name, whole(parameters[name].detach()).cpu()) for name in model.layout)
    with ranks.first_alone() as is_first:  # nobody goes on before the directory is there
        try:
            if is_first:
                model.write(directory, tensors, tokenizer_from)
        finally:
            for _ in tensors:  # also where the disk is full: every rank has to ask for them
                pass
