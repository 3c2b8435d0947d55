"""Sizes of nested models: checking, normal form and nestedness."""

import itertools

import numpy as np
import pytest
import torch
from transformers import NemotronHConfig

from elastic_core import Submodel
from elastic_core.model.submodel import full_sizes, full_submodel
from tests.support.models.parents import random_config, random_submodel
from tests.support.oracles.index_sets import index_sets

PER_LAYER = ("intermediate_size", "mamba_num_heads", "num_attention_heads")
CONFIG = NemotronHConfig(
    vocab_size=16,
    hidden_size=8,
    layers_block_type=NemotronHConfig._pattern_to_list("M-*-M"),
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    intermediate_size=12,
    mamba_num_heads=6,
    mamba_head_dim=4,
    n_groups=3,
    ssm_state_size=4,
)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 9}, ["hidden_size", "got 9", "1 to 8"]),
        ({"hidden_size": 0}, ["hidden_size", "got 0", "1 to 8"]),
        ({"hidden_size": (8, 8)}, ["hidden_size", "(8, 8)", "one size"]),
        ({"hidden_size": 7.5}, ["hidden_size", "7.5", "integer"]),
        ({"hidden_size": "wide"}, ["hidden_size", "'wide'", "integer"]),
        ({"kept_layers": [0, 1.7]}, ["kept_layers", "1.7", "integers"]),
        ({"intermediate_size": -3}, ["intermediate_size", "got -3", "1 to 12"]),
        ({"intermediate_size": [12]}, ["intermediate_size", "1 entries", "there are 2"]),
        ({"intermediate_size": [12, 13]}, ["intermediate_size", "got 13", "1 to 12"]),
        ({"mamba_num_heads": 4}, ["mamba_num_heads", "got 4", "multiples of 3", "3 to 6"]),
        ({"mamba_num_heads": [3, 4]}, ["mamba_num_heads", "got 4", "multiples of 3"]),
        ({"mamba_head_dim": 5}, ["mamba_head_dim", "got 5", "1 to 4"]),
        ({"mamba_head_dim": [4, 3]}, ["mamba_head_dim", "one size"]),
        ({"num_attention_heads": 3}, ["num_attention_heads", "got 3", "multiples of 2"]),
        ({"kept_layers": []}, ["kept_layers", "()", "0..4"]),
        ({"kept_layers": [0, 5]}, ["kept_layers", "(0, 5)", "0..4"]),
        ({"kept_layers": [-1, 2]}, ["kept_layers", "(-1, 2)", "0..4"]),
        ({"kept_layers": [1, 1]}, ["kept_layers", "(1, 1)", "different"]),
        ({"kept_layers": 3}, ["kept_layers", "got 3", "0..4"]),
    ],
)
def test_errors_name_what_was_given_and_what_is_allowed(fields, words):
    with pytest.raises(ValueError) as error:
        Submodel(**fields).resolve(CONFIG)
    for word in words:
        assert word in str(error.value)


def test_lists_become_tuples_and_any_integer_becomes_int():
    listed = Submodel(kept_layers=[4, 0], intermediate_size=[3, 4])
    assert listed == Submodel(kept_layers=(4, 0), intermediate_size=(3, 4))
    assert len({listed, Submodel(kept_layers=(4, 0), intermediate_size=(3, 4))}) == 1
    other = Submodel(hidden_size=np.int64(4), kept_layers=np.array([0, 1]), intermediate_size=torch.tensor([3, 4]))
    assert other == Submodel(hidden_size=4, kept_layers=(0, 1), intermediate_size=(3, 4))
    assert type(other.hidden_size) is int and all(type(i) is int for i in other.kept_layers)


def test_resolved_submodels_have_one_normal_form():
    full = full_submodel(CONFIG)
    assert full == Submodel(8, (0, 1, 2, 3, 4), 12, 6, 4, 4)
    assert Submodel(intermediate_size=(12, 12), kept_layers=range(5)).resolve(CONFIG) == full
    # Layers come sorted; what is said about a dropped layer does not matter, be it nonsense.
    assert Submodel(kept_layers=(3, 0)).resolve(CONFIG).kept_layers == (0, 3)
    for entry in (5, 7, 0, 99):
        kept = Submodel(kept_layers=(0, 1, 2, 4), intermediate_size=(6, entry)).resolve(CONFIG)
        assert kept == Submodel(kept_layers=(0, 1, 2, 4), intermediate_size=6).resolve(CONFIG)
        assert kept.is_homogeneous
    config = NemotronHConfig(**CONFIG.to_dict() | {"layers_block_type": [*CONFIG.layers_block_type, "mlp"]})
    one, two = (Submodel(kept_layers=(0, 1, 3), intermediate_size=(5, 6, n)).resolve(config) for n in (7, 8))
    assert one == two and not one.is_homogeneous
    # No layer of the type is left: nothing differs any more.
    assert Submodel(kept_layers=(0,), intermediate_size=(5, 6, 7)).resolve(config).is_homogeneous
    for submodel in (one, full):
        assert submodel.resolve(config if submodel is one else CONFIG) == submodel


@pytest.mark.parametrize("seed", range(8))
def test_dict_and_sizes_round_trip(seed):
    config = random_config(seed)
    submodel = random_submodel(config, seed, PER_LAYER)
    assert Submodel(**submodel.to_dict()) == submodel
    sizes, full = submodel.sizes(config), full_sizes(config)
    assert sizes.keys() == full.keys() and all(1 <= sizes[key] <= full[key] for key in full)
    assert full_submodel(config).sizes(config) == full


def test_is_within_agrees_with_index_sets():
    """A submodel is within another exactly where every parameter's kept entries are contained in the other's."""
    answers = []
    for seed in range(6):
        config = random_config(seed)
        submodels = [random_submodel(config, 10 * seed + i, PER_LAYER if i % 2 else ()) for i in range(4)]
        a = submodels[0].resolve(config)
        smaller = Submodel(max(1, a.hidden_size - 1), a.kept_layers[:-1] or a.kept_layers, 1, config.n_groups, 1)
        submodels += [smaller, Submodel(), Submodel(hidden_size=max(1, a.hidden_size - 1), kept_layers=a.kept_layers)]
        for one, other in itertools.product(submodels, repeat=2):
            mine, theirs = index_sets(config, one), index_sets(config, other)
            contained = mine.keys() <= theirs.keys() and all(
                set(m) <= set(t) for name in mine for m, t in zip(mine[name], theirs[name], strict=True)
            )
            assert one.is_within(other, config) == contained
            answers.append(contained)
    assert 0.2 < sum(answers) / len(answers) < 0.8  # both answers occur
