"""A tiny parent, its choices and a router over them."""

import torch
from transformers import NemotronHConfig

from elastic_core.search.choices import Choices
from elastic_core.search.router import Router
from elastic_core.search.space import ElasticSpace

CONFIG = NemotronHConfig(
    vocab_size=32,
    hidden_size=16,
    layers_block_type=NemotronHConfig._pattern_to_list("M-*-M"),
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    intermediate_size=24,
    ssm_state_size=4,
    mamba_num_heads=4,
    mamba_head_dim=6,
    n_groups=2,
    use_bias=True,
    mlp_bias=True,
)


RANKING = (0, 2, 1, 4, 3)  # layers, the most important first


PER_LAYER = ("intermediate_size", "mamba_num_heads", "num_attention_heads")


SIZES = {
    "hidden_size": (16, 14, 12, 10, 8),
    "intermediate_size": (24, 16, 8),
    "mamba_num_heads": (4, 2),
    "mamba_head_dim": (6, 4, 2),
    "num_attention_heads": (4, 2),
    "depth": (5, 4, 3),
}


TARGETS = (1.0, 0.7, 0.5, 0.4)


def make_space(heterogeneous=(), **sizes):
    return ElasticSpace(CONFIG, Choices(**{**SIZES, **sizes}, heterogeneous=heterogeneous), RANKING)


def make_router(space, seed=0, targets=TARGETS, spread=1.0):
    """A router whose weights are `spread` times wider than at the start, so that it has opinions."""
    torch.manual_seed(seed)
    router = Router(space, targets)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.mul_(spread)
    return router
