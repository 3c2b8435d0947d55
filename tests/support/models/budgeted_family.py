"""A tiny family trained for budgets in bytes or time."""

import torch
from transformers import NemotronHConfig

from elastic_core.cost.targets import shares
from elastic_core.data.loader import PackedSequences
from elastic_core.search.choices import Choices
from elastic_core.search.router import Router
from elastic_core.search.space import ElasticSpace
from elastic_core.training.loop import train
from elastic_core.training.run import Run
from elastic_core.training.stage import Routing
from tests.support.models.parents import random_elastic
from tests.support.runs import make_stage, measured_on_little_text

CONFIG = NemotronHConfig(
    vocab_size=32,
    hidden_size=16,
    layers_block_type=NemotronHConfig._pattern_to_list("M*-M*-"),
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    intermediate_size=24,
    ssm_state_size=8,
    mamba_num_heads=4,
    mamba_head_dim=6,
    n_groups=2,
    time_step_limit=(0.001, 1e30),
)


RANKING = (0, 2, 3, 1, 5, 4)  # the second attention goes first, then an MLP


CHOICES = Choices(
    hidden_size=tuple(range(16, 7, -1)),
    intermediate_size=tuple(range(24, 7, -2)),
    mamba_num_heads=(4, 2),
    mamba_head_dim=(6, 5, 4, 3, 2),
    num_attention_heads=(4, 2),
    depth=(6, 5, 4),
)


def train_family(data, metric, budgets):
    """A run of 80 steps, soft for 60, and its rows."""
    targets = shares(budgets, metric, CONFIG)
    stage = make_stage(steps=80, learning_rate=1e-2)
    torch.manual_seed(0)
    router = Router(ElasticSpace(CONFIG, CHOICES, RANKING, metric=metric), tuple(targets.values()))
    run = Run(
        random_elastic(0, CONFIG),
        stage,
        PackedSequences(data, stage.mixture, stage.sequence_length, seed=1),
        targets,
        router=router,
        routing=Routing(share=0.75, learning_rate=5e-3, candidates=4),
        teacher=random_elastic(0, CONFIG),
    )
    with measured_on_little_text():
        return run, list(train(run))
