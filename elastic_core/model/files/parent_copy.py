"""Copies a model directory with the element types that its files have. Memory holds a few blocks of rows.

Where the files already hold exactly the tensors that the copy shall have, they are taken as they are.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from elastic_core.io.tensor_files import Stored
from elastic_core.model import architectures, hf
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.model.files.experts import is_stacked, matrices, matrix_name
from elastic_core.model.files.weights import weight_file_names, weight_map

_SHARE_BLOCKS = 0x40049409  # Linux's FICLONE: a copy that shares the original's blocks until one of them is written


def copy_model(model: ElasticModel, reader: hf.TensorReader, directory: Path, target: Path, may_link: bool) -> None:
    """Write the directory `target` with the weights and the tokenizer of `directory`, complete or not at all.

    `model` is on the meta device, with the configuration of the copy; `reader` has its weights (`ElasticModel.empty`).
    may_link: nobody changes the files of `directory` in place, so that hard links to them may stand in for copies.
    """
    stored = _stored_tensors(model, reader)

    def write_weights(partial: Path) -> None:
        if stored.keys() == weight_map(directory).keys():
            for name in sorted(weight_file_names(directory)):
                place_file(directory / name, partial / name, may_link)
        else:
            entries = {name: tensor.entry for name, tensor in stored.items()}
            hf.write_tensors(partial, entries, ((name, _Rows(tensor)) for name, tensor in stored.items()))

    dtype = reader.stored(next(iter(model.layout))).entry.dtype
    model.write_with(target, write_weights, dtype, tokenizer_from=directory)


def place_file(source: Path, target: Path, may_link: bool) -> None:
    """Give a file a second place: as a link if that is allowed, else as a copy, without its bytes twice if possible."""
    source = source.resolve()  # a link in the hub's cache would be linked itself
    if may_link:
        try:
            os.link(source, target)
            return
        except OSError:  # another disk, or one without links
            pass
    with open(source, "rb") as original, open(target, "xb") as copy:
        try:
            fcntl.ioctl(copy, _SHARE_BLOCKS, original.fileno())
        except OSError:  # a file system without shared blocks
            shutil.copyfileobj(original, copy, 1 << 24)


@dataclass(frozen=True)
class _Rows:
    """The rows of a stored tensor, read when they are asked for."""

    stored: Stored

    def __getitem__(self, rows: slice) -> Tensor:
        return torch.from_numpy(self.stored.read([(rows.start, rows.stop)])).view(self.stored.entry.dtype)


def _stored_tensors(model: ElasticModel, reader: hf.TensorReader) -> dict[str, Stored]:
    """Name in new files → position of its values, for all tensors of the model. Experts have a matrix each."""
    disk_name, found = architectures.of(model.config).disk_name, {}
    for name in model.layout:
        stored = reader.stored(name)
        if is_stacked(name):
            found |= {disk_name(matrix_name(name, i)): matrix for i, matrix in enumerate(matrices(stored))}
        else:
            found[disk_name(name)] = stored
    return found
