"""Budgets and choices that the parent cannot give: refused by the check of all parameters, and by the first stages."""

from pathlib import Path

import pytest
from transformers import LlamaConfig

from elastic_core.config import ConfigError
from tasks.parents.config import new_config
from tasks.runtime.preflight import check_architecture
from tasks.settings.load import read
from tasks.settings.merging import parameters
from tests.support.committed_params import MEMORY, load, parent_directory, put, use_parent, write
from tests.support.pipeline.stages import check_parameters, run_stage
from tests.support.runs import data  # noqa: F401 (a fixture)

PARENT_CANNOT = [
    (
        put("budgets", "small", "9B"),
        r"budgets\.small: got '9B'; allowed: up to the parent's own 1\d\d,\d\d\d param",
    ),
    (put("budgets", "small", "1K"), r"budgets\.small: got 0\.00\d+ \(1,000 parameters\), which no combination of"),
    (put("budgets", "small", "77.4060K"), r"budgets: got \[1\.0, 0\.7, '77\.4060K'\]; allowed: different targets"),
    (
        put("untrained", {"tiny": "20K"}),
        r"untrained\.tiny: got '20K'; .* every trained share \(this is 0\.1\d+ of the pare",
    ),
    (
        put("untrained", {"huge": "2GiB@1k"}),
        r"untrained\.huge: got '2GiB@1k'; allowed: up to the parent's own \d.* M",
    ),
    (put("untrained", {"some": "200KiB"}), r"untrained\.some: got '200KiB'; allowed: bytes at a context in tokens"),
    (
        put("cost", {"metric": "memory", "table": MEMORY["table"]}),
        r"cost\.context: got None; allowed: tokens, such as 131072, here or in a bu",
    ),
    (
        lambda values: values.update(cost=MEMORY, budgets={**values["budgets"], "small": "1GiB"}),
        r"budgets\.small: got '1GiB'; allowed: up to the parent's own \d.* MiB \(512 tokens × 2, weights bf16",
    ),
    (
        lambda values: values.update(cost=MEMORY, budgets={**values["budgets"], "small": "20KiB"}),
        r"budgets\.small: got '20KiB'; allowed: \d+\.\d+ KiB, with all choices at their cheapest, to .* \(512 t",
    ),
    (put("budgets", "small", 0.02), r"budgets\.small: got 0\.02 .*allowed: 0\.\d+ to 1\.0, nearest"),
    (put("choices", "hidden_size", [40, 32]), r"choices\.hidden_size: got \[40, 32\]; .*own 48"),
    (put("choices", "hidden_size", [48, 32, 40]), r"choices\.hidden_size: .*largest first"),
    (put("choices", "mamba_num_heads", [4, 3]), r"choices\.mamba_num_heads: got \[4, 3\]; .*in multiples of 2"),
    (put("choices", "num_attention_heads", [4, 1]), r"choices\.num_attention_heads: .*in multiples of 2"),
    (put("choices", "depth", [7, 6]), r"choices\.depth: got \[7, 6\]; .*own 6"),
]


@pytest.mark.parametrize("change, words", PARENT_CANNOT)
def test_what_the_parent_cannot_give_is_refused_by_the_check_and_by_the_first_stage(
    values, change, words, tmp_path, monkeypatch
):
    change(values)
    load(values, tmp_path, monkeypatch)  # this takes more than reading the values
    for refuse in (check_parameters, lambda: run_stage("prepare_data")):
        with pytest.raises(SystemExit, match=rf"^error: params\.yaml: {words}"):
            refuse()
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_the_stage_parent_refuses_it_too(values, data, tmp_path, monkeypatch):  # noqa: F811
    """As where the data were there already when the budgets were changed."""
    put("budgets", "small", "9B")(values)
    write(values, tmp_path, monkeypatch)
    Path("artifacts").mkdir()
    Path("artifacts/data").symlink_to(data.directory)
    with pytest.raises(SystemExit, match=r"^error: params\.yaml: budgets\.small: got '9B'"):
        run_stage("parent")
    assert not Path("artifacts/parent").exists() and not Path("checkpoints").exists()


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
    use_parent(values, parent_directory(tmp_path, **changes))
    load(values, tmp_path, monkeypatch)
    for refuse in (check_parameters, lambda: run_stage("prepare_data")):
        with pytest.raises(SystemExit, match=rf"^error: params\.yaml: parent: .*parent: .*{words}"):
            refuse()
    assert not Path("artifacts").exists()


def test_only_widths_of_mlps_can_be_padded():
    overrides = ["choices.heterogeneous=[intermediate_size, mamba_num_heads]", "extract.heterogeneous=pad"]
    settings = read(parameters(overrides=overrides), "params.yaml")
    words = r"^extract\.heterogeneous: got 'pad'; allowed: remote_code, as long as .* has mamba_num_heads: only MLP"
    with pytest.raises(ConfigError, match=words):
        check_architecture(settings, new_config(settings.parent.model, 1024))


WITHOUT_STATES = "train_extended.loss.state_weight=0.0"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["evaluate.lengths=[64,4096]"],
            r"^evaluate\.lengths: got 4096; allowed: up to 512, the parent's max",
        ),
        (
            ["train_extended.teacher=cached", "train_extended.kept_logits=1024", WITHOUT_STATES],
            r"^train_extended\.kept_logits: got 1024; allowed: below the size of the vocabulary \(1,000\)",
        ),
    ],
)
def test_what_a_late_stage_asks_of_the_parent_is_checked_before_the_first(overrides, words):
    config = LlamaConfig(vocab_size=1000, max_position_embeddings=512)
    with pytest.raises(ConfigError, match=words):
        check_architecture(read(parameters(overrides=overrides), "params.yaml"), config)


def test_shared_sequences_are_as_long_as_the_convolution_needs():
    workers = ["compute.workers=4", "compute.execution.context_parallel=4", "train_extended.batch_size=4"]
    settings = read(parameters(overrides=[*workers, "train_extended.sequence_length=8"]), "params.yaml")
    config = new_config(settings.parent.model, 1024)
    words = r"^train_extended\.sequence_length: got 8; allowed: 3 tokens or more for each of the workers that share it"
    with pytest.raises(ConfigError, match=words):
        check_architecture(settings, config)


def test_a_parent_on_disk_that_can_give_its_budgets(values, tmp_path, monkeypatch, capsys):
    use_parent(values, parent_directory(tmp_path))
    write(values, tmp_path, monkeypatch)
    check_parameters()
    assert capsys.readouterr().out == "params.yaml is valid\n"
