"""Training runs of a tiny random parent, and the data that they learn from."""

from unittest import mock

import numpy as np
import pytest
import torch

from elastic_core import Submodel
from elastic_core.data.loader import PackedSequences, TokenData
from elastic_core.data.token_files import Manifest, Source, SplitWriter
from elastic_core.search.choices import Choices
from elastic_core.search.router import Router
from elastic_core.search.selection import Member
from elastic_core.search.space import ElasticSpace
from elastic_core.training import candidates
from elastic_core.training.loop import train
from elastic_core.training.run import Run
from elastic_core.training.stage import Loss, Routing, Stage
from tests.support.models.parents import random_elastic, random_ratios
from tests.support.models.routed_family import CONFIG, RANKING, SIZES

FINE = {**SIZES, "hidden_size": tuple(range(16, 7, -1)), "intermediate_size": tuple(range(24, 7, -2))}


BUDGETS = {"full": 1.0, "medium": 0.7, "small": 0.45}


FULL = Submodel().resolve(CONFIG)


MEDIUM = Submodel(14, (0, 1, 2, 4), 16, 4, 6, 4).resolve(CONFIG)


SMALL = Submodel(10, (0, 1, 2), 8, 2, 4, 2).resolve(CONFIG)


MEMBERS = {"full": Member(1.0, FULL), "medium": Member(0.7, MEDIUM), "small": Member(0.45, SMALL)}


TEXT = Loss(ce_weight=1.0, kl_weight=0.0)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A stream in which a token mostly determines the next, and short whole documents, so that rows have padding."""
    directory = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    manifest = Manifest(CONFIG.vocab_size, 0, 0, "no tokenizer", {})

    def document(length):
        tokens = [int(rng.integers(1, 32))]
        while len(tokens) < length:
            tokens.append((5 * tokens[-1] + 3) % 31 + 1 if rng.random() < 0.9 else int(rng.integers(1, 32)))
        return [*tokens, 0]

    for name, too_long, lengths in (("text", "split", [200] * 40), ("short", "drop", rng.integers(4, 15, 200))):
        writer = SplitWriter(directory, name, "train", manifest.dtype)
        for length in lengths:
            writer.append([document(length)], num_bytes=int(length))
        manifest.sources[name] = Source(too_long, {"train": writer.close()})
    manifest.write(directory)
    return TokenData(directory)


def make_stage(**values):
    defaults = {
        "sequence_length": 16,
        "batch_size": 6,
        "steps": 12,
        "learning_rate": 3e-3,
        "mixture": {"text": 0.7, "short": 0.3},
        "microbatches": 3,
        "warmup_steps": 2,
        "checkpoint_every": 3,
    }
    stage = Stage(**{**defaults, **values})
    stage.check()
    return stage


def make_router(seed=0):
    torch.manual_seed(seed)
    return Router(ElasticSpace(CONFIG, Choices(**FINE), RANKING), tuple(BUDGETS.values()))


def make_run(data, stage, routed=False, teacher=True, members=None, private_norms=False, **values):
    """A run of the random parent: with a router, or with the given members."""
    members = None if routed else members or MEMBERS
    model = random_elastic(0, CONFIG)
    model.norm_gains = random_ratios(CONFIG) if private_norms else None
    return Run(
        model,
        stage,
        PackedSequences(data, stage.mixture, stage.sequence_length, seed=1),
        {name: BUDGETS[name] for name in BUDGETS if routed or name in members},
        members=members,
        router=make_router() if routed else None,
        teacher=random_elastic(0, CONFIG) if teacher else None,
        **values,
    )


def rows_without_time(rows):
    return [{key: value for key, value in row.items() if key not in ("seconds", "memory_bytes")} for row in rows]


def assert_same(first, second):
    """Equal to the bit, through nested containers."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, two in zip(first, second, strict=True):
            assert_same(one, two)
    else:
        assert first == second


def routed_run(data, directory, **values):
    stage = make_stage(**values)
    routing = Routing(share=0.5, settle_steps=100, candidates=4)  # soft for exactly 6 of 12 steps
    return make_run(data, stage, routed=True, private_norms=True, routing=routing, checkpoints=directory)


@pytest.fixture(scope="session")
def straight(data, tmp_path_factory):
    """A routed run without a break, and its rows."""
    run = routed_run(data, tmp_path_factory.mktemp("straight"))
    with measured_on_little_text():
        return run, rows_without_time(train(run))


def measured_on_little_text():
    """A context in which the router's candidates are compared on four microbatches, not on sixteen."""
    return mock.patch.object(candidates, "MOST_PARTS", 4)


@pytest.fixture
def little_text():
    with measured_on_little_text():
        yield
