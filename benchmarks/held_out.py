"""What a submodel makes of the held-out text, of which the evaluate stage reads as much."""

from functools import partial

import torch

from elastic_core import ElasticModel, Submodel
from elastic_core.data.loader import IGNORED_LABEL, TokenData, held_out_batches
from elastic_core.model.ops.cross_entropy import chunked_cross_entropy
from tasks.evaluation.text_scores import is_text
from tasks.settings.sections import Evaluate


@torch.no_grad()
def held_out_loss(
    model: ElasticModel, submodel: Submodel, data: TokenData, section: Evaluate
) -> tuple[float, int, float]:
    """Cross-entropy in nats, summed over all sources of text; the number of predicted tokens, and their bytes."""
    sliced, nats, num_tokens, num_bytes = model.slice(submodel), 0.0, 0, 0.0
    for source in filter(partial(is_text, data), section.held_out):
        per_token = data.bytes_per_token(source, "held_out")
        batches = held_out_batches(data, source, section.sequence_length, section.batch_size, section.max_tokens)
        for ids, labels, _ in batches:
            hidden, tokens = model.hidden_states(ids, sliced).flatten(0, 1), int((labels != IGNORED_LABEL).sum())
            nats += chunked_cross_entropy(hidden, model.head(sliced), labels.flatten()).item()
            num_tokens, num_bytes = num_tokens + tokens, num_bytes + tokens * per_token
    return nats, num_tokens, num_bytes
