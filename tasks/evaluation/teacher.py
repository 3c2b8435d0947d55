"""The parent as a teacher without the parent: the inputs of its head on held-out text, computed once, and its head.

A model is compared with the parent token by token. The states (tokens, hidden) take a small part of the memory of the
logits (tokens, vocab), and the head a small part of that of the parent. So a worker has one whole model at a time.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from elastic_core.data.loader import IGNORED_LABEL, Batch
from elastic_core.io import storage

HEAD = "head.safetensors"
States = Callable[[Batch], Tensor]  # the next batch (B, L) → the inputs of the parent's head (B, L, hidden)


@torch.no_grad()
def head_inputs(model, input_ids: Tensor) -> Tensor:
    """The inputs (B, L, hidden) of the head of a transformers model, in the type of the head's weight."""
    states = model.base_model(input_ids, use_cache=False).last_hidden_state
    return states.to(model.get_output_embeddings().weight.dtype)


class LiveTeacher:
    """A parent that is in memory, a transformers model."""

    def __init__(self, model):
        self._model, self.head = model, model.get_output_embeddings().weight.detach()

    def states(self, source: str, length: int) -> States:
        """As `CachedTeacher.states`."""
        return lambda batch: head_inputs(self._model, batch.input_ids)


def needed(labels: Tensor) -> Tensor:
    """The number of positions of every row (B,) up to its last label: only their states are kept."""
    positions = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return ((labels != IGNORED_LABEL) * positions).amax(1).cpu()


class CachedTeacher:
    """States and head of a parent at `location` (a directory or URL), as `write_states` and `write_head` left them."""

    def __init__(self, location: str, device: torch.device):
        self.location = location
        self.head = load(storage.read_bytes(storage.join(location, HEAD)))["weight"].to(device)

    def states(self, source: str, length: int) -> States:
        """The states for the batches of a source in sequences of `length`, which have to come in their order.

        The sizes of the batches may be others than when the states were computed. After the last label of a row, they
        are 0.
        """
        stored = load(storage.read_bytes(storage.join(self.location, name_of(source, length))))
        rows = iter(stored["states"].split(stored["lengths"].tolist()))

        def next_states(batch: Batch) -> Tensor:
            states = torch.zeros((*batch.input_ids.shape, self.head.shape[1]), dtype=stored["states"].dtype)
            for target in states:
                row = next(rows)
                target[: len(row)] = row
            return states.to(self.head)

        return next_states


def name_of(source: str, length: int) -> str:
    return f"{source}-{length}.safetensors"


def write_head(model, location: str) -> None:
    """Write the head of a transformers model at `location`."""
    weight = model.get_output_embeddings().weight.detach().cpu().contiguous()
    storage.write_bytes(storage.join(location, HEAD), save({"weight": weight}))


@torch.no_grad()
def write_states(model, batches: Iterable[Batch], location: str, source: str, length: int) -> None:
    """Compute the inputs of the head of a transformers model on batches, and write them at `location`."""
    states, lengths = [], []
    for batch in batches:
        lengths.append(needed(batch.labels).tolist())
        rows = zip(head_inputs(model, batch.input_ids), lengths[-1], strict=True)
        states.extend(row[:number].cpu() for row, number in rows)
    content = {"states": torch.cat(states), "lengths": torch.from_numpy(np.concatenate(lengths))}
    storage.write_bytes(storage.join(location, name_of(source, length)), save(content))
