"""Cross-entropy from hidden states in chunks of tokens, so that the logits of all tokens are never in memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_core.data.loader import IGNORED_LABEL

CHUNK = 1024  # tokens with logits in memory at one time


def chunked_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """The sum of the next-token cross-entropy in nats, forward only. hidden (T, H), head (V, H), labels (T,) → ().

    Positions with IGNORED_LABEL do not count. The sum is in float64.
    """
    total = hidden.new_zeros((), dtype=torch.float64)
    for h, y in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        logits = F.linear(h, head)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total += F.cross_entropy(logits, y, ignore_index=IGNORED_LABEL, reduction="sum")
    return total
