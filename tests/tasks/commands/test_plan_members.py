"""Which families `elastic plan` plans, and which the check of time limits counts: all that a run accepts."""

import pytest

from elastic_core.config import ConfigError
from elastic_core.cost import budgets
from elastic_core.cost.metrics import num_parameters
from elastic_core.model.submodel import Submodel
from tasks.commands import plan
from tasks.commands.plan_stages import Hardware
from tasks.parents.targets import resolve
from tasks.settings.load import read
from tasks.settings.merging import parameters
from tests.support.pipeline.command_line import call

ON_A_GPU = ["compute.workers=1", "compute.gpus_per_worker=1"]
SIZES = {"hidden_size": [128], "intermediate_size": [512, 256], "mamba_head_dim": [24], "mamba_num_heads": [8]}
SIZES |= {"num_attention_heads": [4], "depth": [8]}
MIXED = ["choices.heterogeneous=[intermediate_size]"]


def overrides_of(share: float, *more: str) -> list[str]:
    shares = [f"{stage}.budget_shares={{full: 1, less: 1}}" for stage in ("train_short", "train_extended")]
    sizes = [f"choices.{name}={values}" for name, values in SIZES.items()]
    return [*sizes, *shares, f"budgets={{full: 1.0, less: {share}}}", *more]


def read_with(share: float, *more: str):
    settings = read(parameters("default", overrides=overrides_of(share, *more)))
    return settings, plan.read_parent(settings)[0]


def share_of(config, widths) -> float:
    return num_parameters(config, Submodel(intermediate_size=widths)) / num_parameters(config)


def test_a_family_that_only_sizes_per_layer_meet_is_planned_with_them():
    config = read_with(0.5)[1]
    layers = config.layers_block_type.count("mlp")
    share = share_of(config, (512, *[256] * (layers - 1)))
    assert layers > 1 and abs(share_of(config, 256) / share - 1) > budgets.TOLERANCE
    planned = plan.plan_profile("default", overrides_of(share, *MIXED), None, Hardware())
    assert not planned["assumption"]["uniform"]
    less = planned["budgets"]["less"]
    assert sorted(less["widths"]["intermediate_size"]) == [*[256] * (layers - 1), 512]
    assert less["parameters"] == round(share * num_parameters(config))
    arguments = [word for text in overrides_of(share, *MIXED) for word in ("--set", text)]
    assert "sizes:  differ between layers" in call("plan", "default", *arguments)
    with pytest.raises(ConfigError, match=r"budgets\.less: got .* within 1%"):
        plan.plan_profile("default", overrides_of(share), None, Hardware())


def test_uniform_sizes_are_planned_where_they_meet_the_budgets():
    config = read_with(0.5)[1]
    planned = plan.plan_profile("default", overrides_of(share_of(config, 256), *MIXED), None, Hardware())
    assert planned["assumption"]["uniform"] and planned["budgets"]["less"]["widths"]["intermediate_size"] == 256


@pytest.mark.parametrize("off", [1.015, 0.985])
def test_a_budget_that_a_run_accepts_is_no_fault_of_a_time_limit(off):
    """A run accepts twice the distance that the plan accepts."""
    share = off * share_of(read_with(0.5)[1], 256)
    settings, config = read_with(share, *ON_A_GPU, "time_limits={train_short: 90}")
    with pytest.raises(ConfigError, match=r"within 1%"):
        plan.find_members(settings, config, resolve(settings, config))
    plan.check_time_limits(settings, config)
    short, config = read_with(share, *ON_A_GPU, "time_limits={train_short: 1.0e-9}")
    with pytest.raises(ConfigError, match=r"^time_limits\.train_short: got 1e-09; allowed: "):
        plan.check_time_limits(short, config)


def test_time_limits_are_not_compared_with_the_hours_of_a_family_that_depends_on_the_ranking():
    """Whether budgets can be met is another check's question."""
    settings, config = read_with(0.9 * share_of(read_with(0.5)[1], 256), *ON_A_GPU, "time_limits={train_short: 90}")
    with pytest.raises(ConfigError):
        plan.find_members(settings, config, resolve(settings, config), budgets.TOLERANCE)
    plan.check_time_limits(settings, config)
