"""params.yaml and the profiles: the committed ones load, and each kind of mistake is refused where it can be mended."""

import copy
import re
from pathlib import Path

import pytest
import yaml

from elastic_core.config import ConfigError
from elastic_core.cost.memory import Memory
from elastic_core.cost.metrics import PARAMETERS, exact_cost, num_parameters
from tasks.parents.config import new_config as model_config
from tasks.parents.targets import resolve, resolve_served
from tasks.settings import load as settings_file
from tasks.settings.profiles import _merge
from tests.support.committed_params import COMMITTED, ROOT, load
from tests.support.parents import save_random_parent
from tests.support.routed_family import CONFIG
from tests.support.stages import check_parameters

PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))


def test_the_committed_parameters_load():
    settings = settings_file.load(ROOT / "params.yaml")
    assert settings.budgets and settings.parent.path is None


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_every_profile_loads(profile, tmp_path, monkeypatch):
    values = copy.deepcopy(COMMITTED)
    _merge(values, yaml.safe_load(profile.read_text()))
    if values["parent"]["path"] is not None:
        pytest.skip("starts from a directory that is not here")
    values["cost"]["table"] = str(ROOT / values["cost"]["table"])
    load(values, tmp_path, monkeypatch)


def test_the_base_of_the_cases_below_is_valid(values, tmp_path, monkeypatch):
    assert load(values, tmp_path, monkeypatch).budgets["small"] == 0.45


def test_untrained_budgets_are_served_beside_the_trained_ones(values, tmp_path, monkeypatch):
    values["untrained"] = {"compact": 0.55}
    settings = load(values, tmp_path, monkeypatch)
    assert settings.served == {"full": 1.0, "medium": 0.7, "small": 0.45, "compact": 0.55}
    assert "compact" not in settings.budgets


MEMORY = {"metric": "memory", "context": 512, "batch": 2}


def test_absolute_budgets(values, tmp_path, monkeypatch):
    """Of the parent that params.yaml describes: a count, and bytes, whose setting the budgets may say as well."""
    values["budgets"] |= {"medium": "77K"}
    values["untrained"] = {"compact": 0.6, "long": "300KiB@8k"}  # counted in something else: left to the extraction
    settings = load(values, tmp_path, monkeypatch)
    config = model_config(settings.parent.model, settings.prepare_data.vocab_size)
    full = num_parameters(config)
    assert settings.metric == PARAMETERS
    assert resolve(settings, config) == {"full": 1.0, "medium": pytest.approx(77e3 / full), "small": 0.45}
    serving = exact_cost(Memory(8192), config)
    expected = {"compact": 0.6, "long": pytest.approx(300 * 2**10 / serving)}
    assert {name: share for name, share in resolve_served(settings, config).items() if name in expected} == expected
    metric = Memory(512, 2)
    asked = 0.7 * exact_cost(metric, config)
    values |= {"cost": {"metric": "memory"}, "untrained": {}}
    values["budgets"] |= {"medium": f"{asked / 2**10:.6f}KiB@512×2"}
    settings = load(values, tmp_path, monkeypatch)
    assert settings.metric == metric
    assert list(resolve(settings, config).values()) == [1.0, pytest.approx(0.7), 0.45]
    values["cost"] = MEMORY
    assert load(values, tmp_path, monkeypatch).metric == metric


def put(*path_and_value):
    *path, key, value = path_and_value

    def change(values):
        for name in path:
            values = values[name]
        values[key] = value

    return change


OWN = {"teacher": "trainable", "loss": {"ce_weight": 0.0, "kl_weight": 1.0}}


def section(name, changes):
    return lambda values: values[name].update(changes)


@pytest.mark.parametrize(
    "change, words",
    [
        # unknown or mistyped
        (put("train_shorts", {}), r"params\.yaml\.train_shorts: unknown parameter; did you mean 'train_short'\?"),
        (put("train_short", "batchsize", 3), r"train_short\.batchsize: unknown parameter; did you mean 'batch_size'\?"),
        (put("parent", "model", "hidden", 3), r"parent\.model\.hidden: unknown parameter"),
        (
            put("train_short", "learning_rate", "1e-3"),
            r"train_short\.learning_rate: expected a number, got '1e-3' .*1\.0e-3",
        ),
        (put("train_short", "steps", "ten"), r"train_short\.steps: expected an integer, got 'ten'"),
        (put("rank", "measure", "loss"), r"rank\.measure: got 'loss'; allowed: projection, written"),
        (put("rank", "aggregation", "max"), r"rank\.aggregation: got 'max'; allowed: .*l1"),
        (put("rank", "depth_method", "random"), r"rank\.depth_method: got 'random'; allowed: iterative_nmse"),
        (put("rank", "depth_batches", 1000), r"rank\.depth_batches: got 1000; allowed: 1 to 4"),
        (put("extract", "dtype", "float16"), r"extract\.dtype: got 'float16'; allowed: 'float32', 'bfloat16'"),
        (put("seed", -1), r"seed: got -1; allowed: 0 or more"),
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
        (put("untrained", {"tiny": 0.45}), r"untrained\.tiny: got 0\.45; allowed: .* 0\.45 and 1\.0, and none of them"),
        (put("untrained", {"other": 0.7}), r"untrained\.other: got 0\.7; allowed: .*none of them"),
        (put("untrained", {"tiny": 0.3}), r"untrained\.tiny: got 0\.3; allowed: a share between the trained 0\.45"),
        (put("untrained", ["tiny"]), r"untrained: expected "),
        (
            put("budgets", "small", "9B"),
            r"budgets\.small: got '9B'; allowed: up to the parent's own 1\d\d,\d\d\d param",
        ),
        (
            put("budgets", "small", "70%"),
            r"budgets\.small: got '70%'; allowed: a fraction as 0\.75, a count as 9B, mem",
        ),
        (put("budgets", "small", "1K"), r"budgets\.small: got 0\.00\d+ \(1,000 parameters\), which no combination of"),
        (put("budgets", "small", "77.4060K"), r"budgets: got \[1\.0, 0\.7, '77\.4060K'\]; allowed: different targets"),
        (
            put("untrained", {"tiny": "20K"}),
            r"untrained\.tiny: got '20K'; .* none of them \(this is 0\.1\d+ of the pare",
        ),
        (
            put("untrained", {"huge": "2GiB@1k"}),
            r"untrained\.huge: got '2GiB@1k'; allowed: up to the parent's own \d.* M",
        ),
        (put("untrained", {"some": "200KiB"}), r"untrained\.some: got '200KiB'; allowed: bytes at a context in tokens"),
        # what budgets are counted in
        (put("budgets", "small", "90KiB@4k"), r"budgets\.small: got '90KiB@4k'; .* set cost: {metric: memory}"),
        (
            put("cost", {"metric": "memory"}),
            r"cost\.context: got None; allowed: tokens, such as 131072, here or in a bu",
        ),
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
        (
            lambda values: values.update(cost=MEMORY, budgets={**values["budgets"], "small": "1GiB"}),
            r"budgets\.small: got '1GiB'; allowed: up to the parent's own \d.* MiB \(512 tokens × 2, weights bf16",
        ),
        (
            lambda values: values.update(cost=MEMORY, budgets={**values["budgets"], "small": "20KiB"}),
            r"budgets\.small: got '20KiB'; allowed: \d+\.\d+ KiB, with all choices at their cheapest, to .* \(512 t",
        ),
        (put("budgets", "small", 0.02), r"budgets\.small: got 0\.02 .*the choices give 0\.\d+ to 1\.0, nearest"),
        # choices
        (put("choices", "hidden_size", [40, 32]), r"choices\.hidden_size: got \[40, 32\]; .*own 48"),
        (put("choices", "hidden_size", [48, 32, 40]), r"choices\.hidden_size: .*largest first"),
        (put("choices", "mamba_num_heads", [4, 3]), r"choices\.mamba_num_heads: got \[4, 3\]; .*in multiples of 2"),
        (put("choices", "num_attention_heads", [4, 1]), r"choices\.num_attention_heads: .*in multiples of 2"),
        (put("choices", "depth", [7, 6]), r"choices\.depth: got \[7, 6\]; .*own 6"),
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
        (put("parent", "model", None), r"parent\.model: got None; allowed: a section, as long as parent\.path is null"),
        (put("parent", "training", "loss", {"kl_weight": 1.0}), r"training\.loss\.kl_weight: got 1\.0; allowed: 0"),
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
            r"params\.yaml\.evaluate\.benchmarks\.include: got 'nowhere'; allowed: a directory",
        ),
        (put("evaluate", "tasks", ["chains_7"]), r"evaluate\.tasks: got 'chains_7'; allowed: chains_3"),
        (
            put("train_short", "budget_shares", {"tiny": 1.0}),
            r"train_short\.budget_shares: got 'tiny'; allowed: full, medium",
        ),
        (put("budgets", "tiny", 0.4), r"train_short\.budget_shares: got {'full': .*; allowed: tiny as well"),
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
            r"train_short\.teacher: got 'trainable'; allowed: frozen, as long as no budget is 1\.0",
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


def parent_directory(tmp_path, **changes):
    """A parent on disk, of the size of the cases above or not."""
    import json

    directory = tmp_path / "parent"
    save_random_parent(directory, 0, CONFIG)
    (directory / "tokenizer.json").write_text("{}")
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def use(values, directory):
    values["parent"] = {"path": str(directory)}
    values["choices"] = {"hidden_size": list(range(16, 5, -1)), "intermediate_size": list(range(24, 1, -1))}


def test_a_parent_on_disk(values, tmp_path, monkeypatch):
    use(values, parent_directory(tmp_path))
    assert load(values, tmp_path, monkeypatch).parent.path == str(tmp_path / "parent")


def test_a_parent_that_is_not_there(values, tmp_path, monkeypatch):
    use(values, tmp_path / "nowhere")
    words = r"parent\.path: got '.*nowhere'; allowed: a Hugging Face directory with a config\.json, or null"
    with pytest.raises(ConfigError, match=words):
        load(values, tmp_path, monkeypatch)


def test_a_parent_without_a_tokenizer(values, tmp_path, monkeypatch):
    use(values, parent_directory(tmp_path))
    (tmp_path / "parent" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"parent\.path: got '.*parent'; allowed: a directory with its tokenizer too"):
        load(values, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "gpt2"}, r"model_type is 'gpt2'; allowed: 'nemotron_h'"),
        (
            {"layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"], "n_group": 3},
            r"n_routed_experts=8 is not a multiple of n_group=3",
        ),
        ({"intermediate_size": [24, 16]}, r"a heterogeneous submodel cannot be a parent"),
        ({"n_groups": 3}, r"mamba_num_heads=4 is not a multiple of n_groups=3"),
    ],
)
def test_a_parent_of_another_kind(values, tmp_path, monkeypatch, changes, words):
    use(values, parent_directory(tmp_path, **changes))
    with pytest.raises(ConfigError, match=rf"^params\.yaml: parent: .*parent: .*{words}"):
        load(values, tmp_path, monkeypatch)


def test_a_file_that_is_missing_or_no_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/params.yaml: not there; run from the top")):
        settings_file.load()
    Path("params.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"^params\.yaml: not valid YAML: "):
        settings_file.load()
    Path("params.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"^params\.yaml: expected a section with keys, got None"):
        settings_file.load()


def test_the_command_line_says_it_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^error: .*params\.yaml: not there"):
        check_parameters()
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    for table in (None, "nowhere.json"):  # which dvc.yaml names, whatever budgets are counted in
        values["cost"]["table"] = table
        Path("params.yaml").write_text(yaml.safe_dump(values))
        with pytest.raises(
            SystemExit, match=rf"^error: params\.yaml: cost\.table: got {table!r}; allowed: a file that"
        ):
            check_parameters()
    monkeypatch.chdir(ROOT)
    check_parameters()
    assert capsys.readouterr().out == "params.yaml is valid\n"
