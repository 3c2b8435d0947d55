"""The uniform counterpart of a heterogeneous submodel, against a search among all homogeneous ones of its shape."""

import dataclasses

import pytest
from transformers import NemotronHConfig

from elastic_core import Submodel
from elastic_core.cost.memory import Memory
from elastic_core.cost.metrics import PARAMETERS, exact_cost, num_parameters
from elastic_core.model.axes import PER_LAYER
from elastic_core.search.uniform import uniform_counterpart
from tests.support.models.parents import CONFIGS, random_submodel


@pytest.mark.parametrize("metric", [PARAMETERS, Memory(64)], ids=["parameters", "memory"])
@pytest.mark.parametrize("architecture, fields", [("nemotron_h", PER_LAYER), ("llama", ("intermediate_size",))])
def test_costs_as_much_as_uniform_widths_can(architecture, fields, metric):
    heterogeneous = 0
    for seed in range(12):
        config = CONFIGS[architecture](seed)
        submodel = random_submodel(config, seed, fields).resolve(config)
        uniform = uniform_counterpart(config, submodel, metric)
        assert uniform.is_homogeneous
        same = [field.name for field in dataclasses.fields(Submodel) if field.name not in PER_LAYER]
        assert [getattr(uniform, name) for name in same] == [getattr(submodel, name) for name in same]
        if submodel.is_homogeneous:
            assert uniform == submodel
            continue
        heterogeneous += 1
        target = exact_cost(metric, config, submodel)
        finest = max(
            (name for name in fields if isinstance(getattr(submodel, name), tuple)),
            key=lambda name: len(valid(config, uniform, name)),
        )
        best = min(
            abs(exact_cost(metric, config, dataclasses.replace(uniform, **{finest: size})) - target)
            for size in valid(config, uniform, finest)
        )
        assert abs(exact_cost(metric, config, uniform) - target) == best
    assert heterogeneous >= 4


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


def test_the_mean_width_of_layers_of_one_size_costs_exactly_as_much():
    config = NemotronHConfig(
        **{"vocab_size": 64, "hidden_size": 32, "layers_block_type": ["mamba", "mlp", "mamba", "mlp", "mamba"]},
        **{"intermediate_size": 64, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8},
    )
    submodel = Submodel(kept_layers=(0, 1, 2, 3), mamba_num_heads=(8, 4, 2), intermediate_size=(64, 32))
    uniform = uniform_counterpart(config, submodel)  # the last layer is dropped, and does not count
    assert (uniform.mamba_num_heads, uniform.intermediate_size) == (6, 48)
    assert num_parameters(config, uniform) == num_parameters(config, submodel)
