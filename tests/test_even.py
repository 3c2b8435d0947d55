"""The even counterpart of a heterogeneous submodel, against a search among all homogeneous ones of its shape."""

import dataclasses

import pytest
from parents import CONFIGS, random_submodel
from transformers import NemotronHConfig

from elastic_core import Submodel
from elastic_core.cost import PARAMETERS, Memory, exact_cost, num_parameters
from elastic_core.even import even_counterpart
from elastic_core.submodel import PER_LAYER


@pytest.mark.parametrize("metric", [PARAMETERS, Memory(64)], ids=["parameters", "memory"])
@pytest.mark.parametrize("family, fields", [("nemotron_h", PER_LAYER), ("llama", ("intermediate_size",))])
def test_costs_as_much_as_alike_widths_can(family, fields, metric):
    uneven = 0
    for seed in range(12):
        config = CONFIGS[family](seed)
        submodel = random_submodel(config, seed, fields).resolve(config)
        even = even_counterpart(config, submodel, metric)
        assert even.is_homogeneous
        same = [field.name for field in dataclasses.fields(Submodel) if field.name not in PER_LAYER]
        assert [getattr(even, name) for name in same] == [getattr(submodel, name) for name in same]
        if submodel.is_homogeneous:
            assert even == submodel
            continue
        uneven += 1
        target = exact_cost(metric, config, submodel)
        finest = max(
            (name for name in fields if isinstance(getattr(submodel, name), tuple)),
            key=lambda name: len(valid(config, even, name)),
        )
        best = min(
            abs(exact_cost(metric, config, dataclasses.replace(even, **{finest: size})) - target)
            for size in valid(config, even, finest)
        )
        assert abs(exact_cost(metric, config, even) - target) == best
    assert uneven >= 4


def valid(config, submodel: Submodel, name: str) -> list[int]:
    """The sizes that one width may have."""
    found = []
    for size in range(1, getattr(config, name) + 1):
        try:
            dataclasses.replace(submodel, **{name: size}).resolve(config)
        except ValueError:
            continue
        found.append(size)
    return found


def test_means_of_alike_layers_cost_exactly_as_much():
    config = NemotronHConfig(
        **{"vocab_size": 64, "hidden_size": 32, "layers_block_type": ["mamba", "mlp", "mamba", "mlp", "mamba"]},
        **{"intermediate_size": 64, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8},
    )
    uneven = Submodel(kept_layers=(0, 1, 2, 3), mamba_num_heads=(8, 4, 2), intermediate_size=(64, 32))
    even = even_counterpart(config, uneven)  # the last layer is dropped, and does not count
    assert (even.mamba_num_heads, even.intermediate_size) == (6, 48)
    assert num_parameters(config, even) == num_parameters(config, uneven)
