"""The parent's logits without the parent: the inputs of its head on held-out text, computed once, and its head.

A model is compared with the parent token by token. The states (tokens, hidden) take a small part of the memory of the
logits (tokens, vocab), and the head a small part of that of the parent. So a worker has one whole model at a time.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor

from elastic_core.data.loader import IGNORED_LABEL, Batch
from elastic_core.io import storage

HEAD = "head.safetensors"
Logits = Callable[[Batch], Tensor]  # the next batch (B, L) → the parent's logits (B, L, vocab)


def live(model) -> Logits:
    """The logits of a parent that is in memory."""
    return lambda batch: model(batch.input_ids, use_cache=False).logits


def needed(labels: Tensor) -> Tensor:
    """The number of positions of every row (B,) up to its last label: only their states are kept."""
    positions = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return ((labels != IGNORED_LABEL) * positions).amax(1).cpu()


class CachedTeacher:
    """States and head of a parent at `location` (a directory or URL), as `write_states` and `write_head` left them."""

    def __init__(self, location: str, device: torch.device):
        self.location = location
        self.head = load(storage.read_bytes(storage.join(location, HEAD)))["weight"].to(device)

    def logits(self, source: str, length: int) -> Logits:
        """The logits for the batches of a source in sequences of `length`, which have to come in their order.

        The sizes of the batches may be others than when the states were computed.
        """
        stored = load(storage.read_bytes(storage.join(self.location, name_of(source, length))))
        rows = iter(stored["states"].split(stored["lengths"].tolist()))

        def next_logits(batch: Batch) -> Tensor:
            states = torch.zeros((*batch.input_ids.shape, self.head.shape[1]), dtype=stored["states"].dtype)
            for target in states:
                row = next(rows)
                target[: len(row)] = row
            return F.linear(states.to(self.head), self.head).float()

        return next_logits


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

    def keep(head, inputs) -> None:
        states.extend(row[:number].cpu() for row, number in zip(inputs[0], lengths[-1], strict=True))

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        for batch in batches:
            lengths.append(needed(batch.labels).tolist())
            model(batch.input_ids, use_cache=False)
    finally:
        hook.remove()
    content = {"states": torch.cat(states), "lengths": torch.from_numpy(np.concatenate(lengths))}
    storage.write_bytes(storage.join(location, name_of(source, length)), save(content))
