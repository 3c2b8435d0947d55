"""`elastic init`: the profile that it writes is valid as it is, for parents of every architecture."""

import json
import shutil

import pytest
from transformers import LlamaConfig, Qwen3Config

from elastic_core.model import architectures, hf
from elastic_core.search.choices import Choices
from elastic_core.search.selection import check_reachable
from elastic_core.search.space import ElasticSpace
from tasks.commands import check
from tasks.commands.init import choices_of, init, ladder
from tasks.settings.load import read
from tasks.settings.merging import ROOT, parameters
from tests.support.hub_server import files_of, write_cache
from tests.support.models.moe_family import CONFIG as MOE
from tests.support.models.parents import save_random_parent, write_tokenizer
from tests.support.models.routed_family import CONFIG
from tests.support.pipeline.command_line import call, error_of

SIZES = {"vocab_size": 64, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
SIZES |= {"num_hidden_layers": 4, "intermediate_size": 96, "head_dim": 8}
TINY = {"llama": LlamaConfig(**SIZES), "nemotron_h": CONFIG, "qwen3": Qwen3Config(**SIZES), "experts": MOE}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout with two corpora and the committed parameters, as working directory."""
    root = tmp_path / "checkout"
    for name in ("params.yaml", "dvc.yaml", "prefect.toml", "profiles/latency.json", "profiles/smoke.yaml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "corpus").mkdir()
    rows = [json.dumps({"id": i, "body": f"{i} " + "some words " * 50}) for i in range(300)]
    (root / "corpus" / "a.jsonl").write_text("\n".join(rows))
    (root / "corpus" / "b.txt").write_text("some more words\n" * 9000)
    monkeypatch.chdir(root)
    monkeypatch.setattr("tasks.settings.merging.ROOT", root)
    return root


@pytest.fixture(params=TINY)
def parent(request, root):
    directory = root / "models" / f"Tiny {request.param}"
    save_random_parent(directory, 0, TINY[request.param])
    write_tokenizer(directory)
    return directory


def test_the_profile_is_valid_as_it_is(root, parent, capsys):
    path = init(parent.relative_to(root), ["corpus/*.txt"], root=root)
    name = parent.name.replace(" ", "-").lower()
    assert path == root / "profiles" / f"{name}.yaml"
    check.main([name], root)
    assert capsys.readouterr().out == f"profiles/{name}.yaml is valid\n"
    settings = read(parameters(name, root))
    assert settings.budgets == {"full": 1.0, "medium": 0.75, "small": 0.5}
    assert settings.parent.path == str(parent) and settings.train_short.mixture == {"corpus": 1.0}
    assert settings.evaluate.tasks == () and settings.evaluate.held_out == tuple(settings.prepare_data.sources)
    lines = path.read_text().splitlines()
    assert all("#" in line or line.endswith(":") for line in lines)


def test_a_parent_on_the_hub_is_named_as_it_is(root, hub_cache):
    """With tied embeddings, whose residual stream cannot be rotated."""
    config = Qwen3Config(**SIZES, tie_word_embeddings=True)
    save_random_parent(root / "model", 0, config)
    write_tokenizer(root / "model")
    write_cache(hub_cache, "me/Tiny-0.1B", files_of(root / "model"), "a" * 40)
    path = init("me/Tiny-0.1B@main", ["corpus/*.txt"], {"full": 1.0, "less": 0.8}, root=root)
    settings = read(parameters("tiny-0.1b", root))
    assert path.name == "tiny-0.1b.yaml" and settings.parent.path == "me/Tiny-0.1B@main"
    assert settings.rank.basis == "channels"


def test_data_budgets_and_name_are_those_that_are_given(root, parent):
    data = ["corpus/*.jsonl", str(root / "corpus" / "b.txt"), "corpus/?.jsonl"]
    path = init(parent, data, {"all": 1.0, "most": 0.8}, "mine", "body", root=root)
    settings = read(parameters("mine", root))
    assert path.name == "mine.yaml" and settings.budgets == {"all": 1.0, "most": 0.8}
    assert list(settings.prepare_data.sources) == ["corpus", "b", "corpus_2"]
    assert settings.prepare_data.sources["corpus"]["path"] == "corpus/*.jsonl"
    assert settings.prepare_data.sources["corpus"]["text_field"] == "body"
    assert settings.train_short.batch_size % settings.train_short.microbatches == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere", "--data", "corpus/*.txt"], "DIR: got '"),
        (["corpus", "--data", "corpus/*.txt"], "allowed: a Hugging Face directory with a config.json"),
        (["PARENT", "--data", "nothing/*.txt"], "--data: path 'nothing/*.txt': no file matches it"),
        (
            ["PARENT", "--data", "params.yaml"],
            "cannot read '.yaml' files; allowed: .txt, .jsonl, .json (each",
        ),
        (
            ["PARENT", "--data", "corpus/*.jsonl"],
            "(fields: 'id', 'body'); set text_field; name the field with --text-f",
        ),
        (["PARENT", "--data", "corpus/*.txt", "--name", "../x"], "--name: got '../x'"),
        (["PARENT", "--data", "corpus/*.txt", "--name", "default"], "--name: got 'default'"),
        (["PARENT", "--data", "corpus/*.txt", "--name", "smoke"], "exists; choose another --name, or replace it"),
        (["PARENT", "--data", "corpus/*.txt", "--budget", "small"], "--budget: got 'small'"),
        (["PARENT", "--data", "corpus/*.txt", "--budget", "a=0.001"], "budgets.a: got 0.001"),
        (["PARENT", "--data", "corpus/*.txt", "--budget", "a=5ms/token"], "--budget: got '5ms/token'"),
        (["PARENT", "--data", "corpus/*.txt", "--budget", "a=9B"], "budgets.a: got '9B'; allowed: up to the parent"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(root, arguments, words):
    directory = root / "models" / "llama"
    save_random_parent(directory, 0, TINY["llama"])
    write_tokenizer(directory)
    before = sorted((root / "profiles").iterdir())
    assert words in error_of("init", *(str(directory) if text == "PARENT" else text for text in arguments))
    assert sorted((root / "profiles").iterdir()) == before


def test_the_command_says_what_comes_next_and_replaces_nothing_unasked(root, parent):
    arguments = ["init", parent, "--data", "corpus/*.txt", "--name", "mine"]
    told = call(*arguments)
    assert "elastic plan mine" in told and "elastic run mine" in told
    assert "exists" in error_of(*arguments)
    call(*arguments, "--force")


def test_a_damaged_parent_is_named(root, parent):
    (parent / "config.json").write_text("{")
    assert "is not valid JSON" in error_of("init", parent, "--data", "corpus/*.txt")


REAL = sorted(path.name for path in (ROOT / "profiles" / "parents").iterdir())


@pytest.mark.parametrize("name", REAL)
def test_choices_fit_real_parents(name):
    """They start with the parent's sizes, are multiples that kernels want, and reach the budgets."""
    config = hf.read_config(ROOT / "profiles" / "parents" / name)
    choices = choices_of(config, 0.4, 5, 1.0, 0.7)
    assert choices["hidden_size"][0] == config.hidden_size
    assert all(size % 64 == 0 for size in choices["hidden_size"][1:])
    space = ElasticSpace(config, Choices(**choices), tuple(range(architectures.num_layers(config))))
    check_reachable(space, {"full": 1.0, "medium": 0.75, "small": 0.5}, tolerance=0.02)


@pytest.mark.parametrize("full, least, step", [(4096, 1638, 1), (576, 230, 18), (7, 3, 1), (8, 4, 2), (1, 1, 1)])
def test_a_ladder(full, least, step):
    for count, coarseness in ((5, 1.0), (9, 0.25), (17, 0.0)):
        sizes = ladder(full, least, step, count, coarseness)
        assert sizes[0] == full and list(sizes) == sorted(set(sizes), reverse=True) and len(sizes) <= count
        assert min(sizes) >= least or sizes == (full,)
        assert all(size % step == 0 for size in sizes)
