"""Batch sizes that fit in memory: `auto` begins with a guess, and what does not fit is tried again with half."""

import math
from collections.abc import Callable
from typing import TypeVar

import torch

from tasks.settings.parts.evaluation import BatchSize

Result = TypeVar("Result")

MOST = 256  # sequences; more are hardly faster
LOGIT_BYTES = 16  # per logit of a batch: a rough measure, as logits are computed a few at a time (text_scores.py)
HOST_BYTES = 2**30  # for logits in CPU memory


def first_batch_size(device: torch.device, tokens: int, vocab_size: int) -> int:
    """The batch size with which `auto` begins, for sequences of `tokens` tokens: half of the free memory."""
    free = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else HOST_BYTES
    return max(1, min(MOST, int(free / (tokens * vocab_size * LOGIT_BYTES))))


def fitting(given: BatchSize, device: torch.device, guess: int, work: Callable[[int], Result]) -> Result:
    """The result of `work(batch_size)`, with the first batch size that fits in memory.

    The first is the given one, or `guess` with `auto`; half of the one before follows. A CPU has no second try: the
    system ends a process that takes too much.
    """
    first = guess if given == "auto" else given
    if device.type != "cuda":
        return work(first)
    from accelerate.utils.memory import find_executable_batch_size  # slow

    sizes = iter(first >> halvings for halvings in range(1, math.ceil(math.log2(first)) + 2))
    return find_executable_batch_size(work, first, lambda: next(sizes))()
