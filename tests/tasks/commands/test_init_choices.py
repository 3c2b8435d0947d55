"""The choices of `elastic init`, and of `elastic plan PARENT` for other budgets, meet every family that is possible.

Real configurations, because the sizes that kernels want decide what can be met.
"""

import pytest
from transformers import Qwen2Config, Qwen3Config

from elastic_core.config import ConfigError
from elastic_core.cost.metrics import num_parameters
from elastic_core.model import hf
from elastic_core.model.submodel import Submodel
from tasks.commands import plan
from tasks.commands.init import lengths, new_profile, with_choices
from tasks.commands.planning.parents import CHARACTERS, TEXT, settings_of
from tasks.parents.targets import resolve
from tasks.settings.load import read
from tasks.settings.merging import ROOT, merged
from tasks.settings.yaml_files import parse

# Only hidden sizes of 14 heads can be written for qwen2, so the hidden size and the tied embeddings stay.
QWEN2 = {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
QWEN2 |= {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}


def config_of(name: str):
    return Qwen2Config(**QWEN2) if name == "qwen2" else hf.read_config(ROOT / "profiles" / "parents" / name)


@pytest.mark.parametrize(
    "name, budgets",
    [
        ("NVIDIA-Nemotron-Nano-12B-v2", {"full": 1.0, "medium": "9B", "small": "6B"}),
        ("Qwen3-8B", {"full": 1.0, "small": "12GiB@32k"}),
        ("qwen2", {"full": 1.0, "medium": 0.75, "small": 0.5}),
    ],
)
def test_choices_reach_down_to_the_smallest_budget(name, budgets):
    config = config_of(name)
    profile = new_profile(
        "/nowhere", config, budgets, sources=TEXT, **lengths(config, TEXT, CHARACTERS, len(budgets), 1), gpus=1
    )
    settings = read(merged(parse(with_choices(profile, config, ROOT, lambda values: None), "profile")))
    members, *_ = plan.find_members(settings, config, resolve(settings, config))
    assert settings.budgets == budgets and list(members) == list(budgets)


@pytest.mark.parametrize(
    "overrides",
    [["budgets={full: 1.0, small: 0.25}"], ["budgets={full: 1.0, small: 0.4}", "budgets.small=0.25"]],
)
def test_a_plan_of_a_parent_makes_its_choices_for_the_budgets_that_it_plans(overrides):
    config = config_of("Qwen3-0.6B")
    settings = settings_of("/nowhere", config, overrides, 1)
    assert settings.budgets == {"full": 1.0, "small": 0.25}
    assert settings.train_short.microbatches % 2 == 0  # equal shares of two budgets
    plan.find_members(settings, config, resolve(settings, config))


def test_a_plan_of_a_parent_has_mixed_layers_where_only_they_meet_the_budgets():
    config = Qwen3Config(vocab_size=500, hidden_size=64, intermediate_size=256, num_hidden_layers=4)
    sizes = {"hidden_size": [64], "num_attention_heads": [32], "intermediate_size": [256, 128], "depth": [4]}
    chosen = [f"choices.{name}={values}" for name, values in sizes.items()]
    less = num_parameters(config, Submodel(intermediate_size=(256, 256, 128, 128))) / num_parameters(config)
    budgets = f"budgets={{full: 1.0, less: {less}}}"
    settings = settings_of("/nowhere", config, [*chosen, budgets, "choices.heterogeneous=[intermediate_size]"], 1)
    members, assumption, _ = plan.find_members(settings, config, resolve(settings, config))
    assert not assumption["uniform"] and sorted(members["less"].intermediate_size) == [128, 128, 256, 256]
    with pytest.raises(ConfigError, match=r"^budgets\.less: got .* within 1%"):
        settings_of("/nowhere", config, [*chosen, budgets], 1)


@pytest.mark.parametrize(
    "override, words",
    [
        ("budgets={}", r"^budgets: got \{\}; allowed: one or more"),
        ("budgets=3", r"^budgets: got 3; allowed: a section"),
        ("budgets.small={a: 1}", r"^budgets\.small: got \{'a': 1\}; allowed: a fraction"),
        ("budgets.small=1B", r"^budgets\.small: got '1B'; allowed: up to the parent's own"),
    ],
)
def test_budgets_of_an_override_that_cannot_be_are_named(override, words):
    with pytest.raises(ConfigError, match=words):
        settings_of("/nowhere", config_of("Qwen3-0.6B"), [override], 1)
