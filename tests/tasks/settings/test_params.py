"""params.yaml: the committed one loads, and what can be told to be wrong from its values is refused when it is read.

Whether the parent can give the budgets is another question: tests/tasks/runtime/test_preflight.py.
"""

import re

import pytest

from elastic_core.config import ConfigError
from tasks.settings import load as settings_file
from tests.support.committed_params import MEMORY, ROOT, load, parent_directory, put, use_parent, write


def test_the_committed_parameters_load():
    settings = settings_file.load(ROOT / "params.yaml")
    assert settings.budgets and settings.parent.path is None


def test_the_base_of_the_cases_below_is_valid(values, tmp_path, monkeypatch):
    assert load(values, tmp_path, monkeypatch).budgets["small"] == 0.45


def test_numbers_are_read_as_dvc_reads_them(values, tmp_path, monkeypatch):
    write(values, tmp_path, monkeypatch)
    text = (tmp_path / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("weight: 2.0", "weight: 1e-3").replace("seed: 0", "seed: '7'"))
    with pytest.raises(ConfigError, match=r"^params\.yaml: seed: got '7'; allowed: an integer, without quotes$"):
        settings_file.load()
    (tmp_path / "params.yaml").write_text(text.replace("weight: 2.0", "weight: 1e-3"))
    assert settings_file.load().routing.weight == 1e-3


def test_untrained_budgets_are_served_beside_the_trained_ones(values, tmp_path, monkeypatch):
    values["untrained"] = {"compact": 0.55}
    settings = load(values, tmp_path, monkeypatch)
    assert settings.served == {"full": 1.0, "medium": 0.7, "small": 0.45, "compact": 0.55}
    assert "compact" not in settings.budgets


OWN = {"teacher": "trainable", "loss": {"ce_weight": 0.0, "kl_weight": 1.0}}


def section(name, changes):
    return lambda values: values[name].update(changes)


@pytest.mark.parametrize(
    "change, words",
    [
        # unknown or mistyped
        (put("train_shorts", {}), r"params\.yaml: train_shorts: unknown parameter; did you mean 'train_short'\?"),
        (put("train_short", "batchsize", 3), r"train_short\.batchsize: unknown parameter; did you mean 'batch_size'\?"),
        (put("parent", "model", "hidden", 3), r"parent\.model\.hidden: unknown parameter"),
        (put("train_short", "steps", "ten"), r"train_short\.steps: got 'ten'; allowed: an integer"),
        (put("rank", "measure", "loss"), r"rank\.measure: got 'loss'; allowed: output_norm, projection"),
        (put("rank", "aggregation", "max"), r"rank\.aggregation: got 'max'; allowed: .*l1"),
        (put("rank", "depth_method", "random"), r"rank\.depth_method: got 'random'; allowed: iterative_nmse"),
        (put("rank", "depth_batches", 1000), r"rank\.depth_batches: got 1000; allowed: 1 to 4"),
        (put("extract", "dtype", "float16"), r"extract\.dtype: got 'float16'; allowed: 'float32', 'bfloat16'"),
        (put("seed", -1), r"seed: got -1; allowed: 0 or more"),
        (
            put("train_short", "betas", [0.9, 1.0]),
            r"train_short\.betas: got \(0\.9, 1\.0\); allowed: two numbers from 0 to",
        ),
        (put("train_extended", "weight_decay", -0.1), r"train_extended\.weight_decay: got -0\.1; allowed: 0 or more"),
        (
            put("rank", "mixture", {"prose": 0}),
            r"rank\.mixture: got {'prose': 0\.0}; allowed: shares of 0 or more, not",
        ),
        (lambda values: values.pop("rank"), r"rank: missing"),
        (
            put("prepare_data", "sources", "prose", {"kind": "novel"}),
            r"sources\.prose\.kind: got 'novel'; allowed: bible",
        ),
        # budgets
        (
            put("budgets", "small", 1.5),
            r"budgets\.small: got 1\.5; allowed: a fraction as 0\.75, a count as 9B, memory as 16GiB@128k",
        ),
        (put("budgets", "small", 0), r"budgets\.small: got 0\.0; allowed"),
        (put("budgets", "small", 0.7), r"budgets: got \[1\.0, 0\.7, 0\.7\]; allowed: different targets"),
        (put("budgets", {}), r"budgets: got {}; allowed: one or more"),
        (put("budgets", {"9B": 1.0}), r"budgets: got '9B'; allowed: names of letters, digits and _"),
        (put("budgets", {"parent": 1.0}), r"budgets: got 'parent'; allowed: .* other than parent"),
        (put("untrained", {"0.55": 0.55}), r"untrained: got '0\.55'; allowed: names of letters, digits and _"),
        (put("untrained", {"small": 0.55}), r"untrained: got 'small'; allowed: names that are not in budgets"),
        (put("untrained", {"a": 0.55, "b": 0.55}), r"untrained: got \[0\.55, 0\.55\]; allowed: different targets"),
        (
            put("untrained", {"tiny": 0.45}),
            r"untrained\.tiny: got 0\.45; allowed: .* 0\.45 and 1\.0 that differs from every",
        ),
        (put("untrained", {"other": 0.7}), r"untrained\.other: got 0\.7; allowed: .*differs from every trained share"),
        (put("untrained", {"tiny": 0.3}), r"untrained\.tiny: got 0\.3; allowed: a share between the trained 0\.45"),
        (put("untrained", ["tiny"]), r"untrained: got \['tiny'\]; allowed: a section"),
        (
            put("budgets", "small", "70%"),
            r"budgets\.small: got '70%'; allowed: a fraction as 0\.75, a count as 9B, mem",
        ),
        # what budgets are counted in
        (put("budgets", "small", "90KiB@4k"), r"budgets\.small: got '90KiB@4k'; .* set cost: {metric: memory}"),
        (
            put("cost", {"metric": "time"}),
            r"cost\.metric: got 'time'; allowed: 'parameters', 'active_parameters', 'memory'",
        ),
        (put("cost", {"context": 8}), r"cost\.context: got 8; allowed: nothing, as long as metric is parameters"),
        (put("cost", {**MEMORY, "cache": "fp2"}), r"cost\.cache: got 'fp2'; allowed: float32, bf16, fp8, int8, fp4"),
        (
            lambda values: values.update(cost=MEMORY, budgets={**values["budgets"], "small": "77K"}),
            r"budgets\.small: got '77K'; allowed: a share of the parent's memory, or bytes",
        ),
        (
            lambda values: values.update(cost=MEMORY, budgets={**values["budgets"], "small": "300KiB@8k"}),
            r"budgets\.small: got '300KiB@8k'; allowed: the context of section cost and of the other budgets, 512",
        ),
        # choices
        (
            put("choices", "heterogeneous", ["hidden_size"]),
            r"choices\.heterogeneous: got 'hidden_size'; allowed: inter",
        ),
        # the parent's architecture
        (
            put("parent", "model", "mamba_num_heads", 5),
            r"parent\.model\.mamba_num_heads: got 5; .*multiple of n_groups \(2\)",
        ),
        (put("parent", "model", "num_attention_heads", 3), r"num_attention_heads: got 3; .*num_key_value_heads \(2\)"),
        (put("parent", "model", "n_groups", 0), r"parent\.model\.n_groups: got 0; allowed: above 0"),
        (put("parent", "model", "hidden_size", -8), r"parent\.model\.hidden_size: got -8; allowed: above 0"),
        (
            put("parent", "model", "pattern", "M-E"),
            r"parent\.model\.pattern: got 'M-E'; allowed: characters M, \* and -",
        ),
        (put("parent", "model", None), r"parent\.model: got None; allowed: a section, because parent\.path is null"),
        (put("parent", "training", "loss", {"kl_weight": 1.0}), r"training\.loss\.kl_weight: got 1\.0; allowed: 0"),
        (
            put("parent", "training", "loss", {"ce_weight": 1.0, "kl_weight": 0.0, "state_weight": 0.5}),
            r"training\.loss\.state_weight: got 0\.5; allowed: 0: a parent has no teacher",
        ),
        # names that refer to others
        (put("train_short", "mixture", {"poems": 1.0}), r"train_short\.mixture: got 'poems'; allowed: prose"),
        (put("rank", "mixture", {"poems": 1.0}), r"rank\.mixture: got 'poems'; allowed: prose"),
        (
            put("parent", "training", "mixture", {"poems": 1.0}),
            r"parent\.training\.mixture: got 'poems'; allowed: prose",
        ),
        (put("evaluate", "held_out", ["poems"]), r"evaluate\.held_out: got 'poems'; allowed: prose"),
        (put("evaluate", "cache_tokens", 0), r"evaluate\.cache_tokens: got 0; allowed: 1 or more"),
        (put("evaluate", "latency", {"repeats": 0}), r"evaluate\.latency\.repeats: got 0; allowed: 1 or more"),
        (put("evaluate", "latency", {"tokens": 8}), r"evaluate\.latency\.tokens: unknown parameter"),
        (
            put("evaluate", "benchmarks", {"tasks": ["piqa"], "include": "nowhere"}),
            r"params\.yaml: evaluate\.benchmarks\.include: got 'nowhere'; allowed: a directory",
        ),
        (put("evaluate", "tasks", ["chains_7"]), r"evaluate\.tasks: got 'chains_7'; allowed: chains_3"),
        (
            put("train_short", "budget_shares", {"tiny": 1.0}),
            r"train_short\.budget_shares: got 'tiny'; allowed: full, medium",
        ),
        (
            put("budgets", "tiny", 0.4),
            r"train_short\.budget_shares: got {'full': .*; allowed: .* budget, also for tiny",
        ),
        (
            put("train_extended", "loss_by_budget", {"tiny": {}}),
            r"train_extended\.loss_by_budget: got 'tiny'; allowed: full",
        ),
        # teachers
        (
            section("train_short", OWN),
            r"train_short\.loss_by_budget\.full\.ce_weight: got 0\.0; allowed: above 0: a train",
        ),
        (
            section("train_extended", {**OWN, "teacher": "mixed"}),
            r"train_extended\.loss_by_budget\.full\.ce_weight: .* mixed",
        ),
        (
            lambda values: (
                values["budgets"].pop("full"),
                values["train_short"].update(teacher="trainable", budget_shares={}),
                values["train_extended"].update(budget_shares={}),
            ),
            r"train_short\.teacher: got 'trainable'; allowed: frozen, because no budget is 1\.0",
        ),
    ],
)
def test_mistakes_are_refused_with_what_was_given_what_is_allowed_and_where(
    values, change, words, tmp_path, monkeypatch
):
    change(values)
    with pytest.raises(ConfigError, match=words) as caught:
        load(values, tmp_path, monkeypatch)
    assert str(caught.value).startswith("params.yaml")


def test_a_teacher_that_learns_from_text_is_taken(values, tmp_path, monkeypatch):
    values["train_short"] |= {**OWN, "loss_by_budget": {"full": {"ce_weight": 1.0, "kl_weight": 0.0}}}
    assert load(values, tmp_path, monkeypatch).train_short.loss_of("full").ce_weight == 1.0


def test_a_parent_on_disk(values, tmp_path, monkeypatch):
    use_parent(values, parent_directory(tmp_path))
    assert load(values, tmp_path, monkeypatch).parent.path == str(tmp_path / "parent")


def test_a_parent_that_is_not_there(values, tmp_path, monkeypatch):
    use_parent(values, tmp_path / "nowhere")
    words = r"parent\.path: got '.*nowhere'; allowed: a Hugging Face directory with a config\.json, or null"
    with pytest.raises(ConfigError, match=words):
        load(values, tmp_path, monkeypatch)


def test_a_parent_without_a_tokenizer(values, tmp_path, monkeypatch):
    use_parent(values, parent_directory(tmp_path))
    (tmp_path / "parent" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"parent\.path: got '.*parent'; allowed: a directory with its tokenizer too"):
        load(values, tmp_path, monkeypatch)


def test_a_file_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/params.yaml: does not exist; run from the top")):
        settings_file.load()
