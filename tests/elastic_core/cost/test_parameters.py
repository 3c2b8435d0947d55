"""Parameter counts against models that transformers builds on the meta device."""

import itertools

import pytest
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from elastic_core import Submodel
from elastic_core.cost.metrics import PARAMETERS, expected_cost, num_parameters
from tests.support.models.parents import random_config, random_submodel

PER_LAYER = ("intermediate_size", "mamba_num_heads", "num_attention_heads")
REAL = {  # name: hidden, FFN, query heads, Mamba heads, published count, pattern
    "12B-v2": (5120, 20480, 40, 128, 12_310_001_152, "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"),
    "9B-v2": (4480, 15680, 40, 128, 8_888_227_328, "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"),
    "3-4B": (3136, 12544, 40, 96, 3_973_556_832, "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"),
}


def built(config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in NemotronHForCausalLM(config).parameters())


@pytest.mark.parametrize("name", REAL)
def test_published_counts(name):
    hidden, ffn, heads, mamba_heads, published, pattern = REAL[name]
    config = NemotronHConfig(
        vocab_size=131072,
        hidden_size=hidden,
        layers_block_type=NemotronHConfig._pattern_to_list(pattern),
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        mamba_num_heads=mamba_heads,
        mamba_head_dim=80,
        n_groups=8,
        ssm_state_size=128,
        conv_kernel=4,
    )
    assert num_parameters(config) == published == built(config)


@pytest.mark.parametrize("seed", range(12))
def test_count_equals_the_built_model(seed):
    config = random_config(seed)
    assert num_parameters(config) == built(config)
    for number in range(3):
        submodel = random_submodel(config, 10 * seed + number)
        sizes = {name: value for name, value in submodel.to_dict().items() if name != "kept_layers"}
        kept = [config.layers_block_type[i] for i in submodel.kept_layers]
        small = NemotronHConfig(**config.to_dict() | sizes | {"layers_block_type": kept})
        assert num_parameters(config, submodel) == built(small)


@pytest.mark.parametrize("seed", range(8))
def test_expected_count_at_one_hot_is_the_count(seed):
    config = random_config(seed)
    submodel = random_submodel(config, seed, PER_LAYER)
    sizes = {key: torch.tensor(float(size), dtype=torch.float64) for key, size in submodel.sizes(config).items()}
    keep = torch.tensor([float(i in submodel.kept_layers) for i in range(len(config.layers_block_type))]).double()
    assert expected_cost(PARAMETERS, config, sizes, keep).item() == num_parameters(config, submodel)


def test_expected_count_is_the_expectation_over_independent_choices():
    """Every combination of every choice, weighted by its probability; the layers' depth is one more choice."""
    config = NemotronHConfig(
        vocab_size=11,
        hidden_size=6,
        layers_block_type=NemotronHConfig._pattern_to_list("M-*-"),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=3,
        intermediate_size=7,
        mamba_num_heads=4,
        mamba_head_dim=5,
        n_groups=2,
        ssm_state_size=3,
        use_bias=True,
        mlp_bias=True,
    )
    choices = {
        "hidden": [6, 3],
        "ffn.1": [7, 2],
        "ffn.3": [7, 5, 1],
        "mamba_heads.0": [4, 2],
        "mamba_channels.0": [5, 4],
        "attention_heads.2": [4, 2],
        "depth": [(0, 1, 2, 3), (0, 1, 3), (3,)],
    }
    generator = torch.Generator().manual_seed(0)
    probs = {k: torch.rand(len(v), generator=generator, dtype=torch.float64) for k, v in choices.items()}
    probs = {key: (p / p.sum()).requires_grad_() for key, p in probs.items()}
    enumerated = 0
    for combination in itertools.product(*(range(len(v)) for v in choices.values())):
        picked = dict(zip(choices, combination, strict=True))
        size = {key: choices[key][i] for key, i in picked.items()}
        submodel = Submodel(
            size["hidden"],
            size["depth"],
            (size["ffn.1"], size["ffn.3"]),
            size["mamba_heads.0"],
            size["mamba_channels.0"],
            size["attention_heads.2"],
        )
        weight = torch.stack([probs[key][i] for key, i in picked.items()]).prod()
        enumerated = enumerated + weight * num_parameters(config, submodel)
    sizes = {k: (p * torch.tensor(choices[k]).double()).sum() for k, p in probs.items() if k != "depth"}
    keep = torch.stack(
        [probs["depth"] @ torch.tensor([float(i in c) for c in choices["depth"]]).double() for i in range(4)]
    )
    expected = expected_cost(PARAMETERS, config, sizes, keep)
    assert abs(expected.item() / enumerated.item() - 1) < 1e-14
    leaves = list(probs.values())
    for ours, theirs in zip(*(torch.autograd.grad(v, leaves) for v in (expected, enumerated)), strict=True):
        # The enumeration's gradient also counts that the other probabilities sum to one; the same here.
        assert torch.allclose(ours - ours.mean(), theirs - theirs.mean(), rtol=1e-10)


def test_expected_count_of_a_grid_in_one_call():
    config = random_config(3)
    submodels = [random_submodel(config, seed, PER_LAYER) for seed in range(5)]
    sizes = {
        key: torch.tensor([float(s.sizes(config)[key]) for s in submodels], dtype=torch.float64)
        for key in submodels[0].sizes(config)
    }
    keep = torch.tensor([[float(i in s.kept_layers) for s in submodels] for i in range(len(config.layers_block_type))])
    counts = expected_cost(PARAMETERS, config, sizes, keep.double())
    assert counts.tolist() == [num_parameters(config, s) for s in submodels]
