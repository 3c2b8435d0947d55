"""The command line: it starts at once, says what it found and wrote, and ends with one line where it cannot go on."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from elastic_core import extract as extract_submodel
from elastic_core.export import elastic_checkpoint
from elastic_core.search.selection import Member
from flows.cli.app import app
from tasks.commands import find_family
from tests.support.models.parents import random_config, random_elastic, random_submodel
from tests.support.pipeline.command_line import CONFIG, MEMBERS, WORDS, call, error_of
from tests.support.pipeline.cpu_time import children_seconds

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """What a run leaves: a family with a tokenizer, and the lock that says which stage wrote it."""
    workspace = tmp_path_factory.mktemp("workspace")
    family = workspace / find_family.FAMILY
    random_elastic(5, CONFIG).save_pretrained(family)
    members = {name: Member(1.0 / (i + 1), submodel) for i, (name, submodel) in enumerate(MEMBERS.items())}
    elastic_checkpoint.write(family, CONFIG, members, [])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(family)
    (workspace / "dvc.lock").write_text(
        "stages:\n  train_extended:\n    params: {params.yaml: {seed: 7}}\n"
        "    outs: [{path: artifacts/train_extended, md5: abc.dir}]\n"
    )
    return workspace


@pytest.fixture(scope="module")
def family(workspace):
    return workspace / find_family.FAMILY


def numbers_in(directory):
    """Parameters of a directory, counted in its files."""
    return sum(tensor.numel() for file in directory.glob("*.safetensors") for tensor in load_file(file).values())


# --- help ------------------------------------------------------------------------------------------------------------


def test_it_starts_without_what_commands_need():
    heavy = {"torch", "prefect", "dvc", "transformers", "ray", "numpy", "rich", "ruamel"}
    code = f"import sys, flows.cli.app; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("command", [[], ["run"], ["plan"]])
def test_help_comes_at_once_from_anywhere(command, tmp_path):
    begin = children_seconds()
    line = [sys.executable, "-m", "flows.cli", *command, "--help"]
    environment = {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert children_seconds() - begin < 1.5  # 0.4 s on an idle machine
    assert {"run": "elastic run smoke", "plan": "the paper's run"}.get("".join(command), "generate") in done.stdout


@pytest.mark.parametrize(
    "command", ["adopt", "init", "plan", "run", "compare", "clean", "up", "extract", "generate", "inspect"]
)
def test_every_option_is_explained(command):
    text = call(command, "--help")
    assert "Usage" in text and len(text.splitlines()) > 8


def test_completion_knows_profiles_stages_and_budgets(monkeypatch, family):
    from flows.cli import options

    assert options.complete_profile("smok") == ["smoke"] and "default" in options.complete_profile("")
    assert options.complete_stage("train") == ["train_short", "train_extended"]
    monkeypatch.setattr(find_family, "find", lambda: family)
    assert options.complete_budget("") == list(MEMBERS) and options.complete_budget("s") == ["small"]


def test_up_is_the_dashboard(monkeypatch):

    monkeypatch.setattr("flows.dashboard.server.main", lambda: sys.exit("the port is taken"))
    assert CliRunner().invoke(app, ["up"]).exit_code == 1


# --- which family ----------------------------------------------------------------------------------------------------


def test_the_last_run_is_the_one_that_wrote_last(tmp_path):
    with pytest.raises(ValueError, match="run `elastic run` first"):
        find_family.find(root=tmp_path)
    places = [tmp_path / ".runs" / "smoke", tmp_path, tmp_path / ".runs" / "smoke-0123"]
    for i, place in enumerate(places):
        (place / find_family.FAMILY).mkdir(parents=True)
        (place / find_family.FAMILY / "config.json").write_text("{}")  # written first, before the weights
        assert find_family.find(root=tmp_path) == places[i - 1] / find_family.FAMILY if i else True
        (place / find_family.FAMILY / "elastic.json").write_text("{}")
        assert find_family.find(root=tmp_path) == place / find_family.FAMILY
        time.sleep(0.02)


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_counts_what_extracted_members_have(workspace, family, tmp_path):
    told = json.loads(call("inspect", "--json", workspace))
    assert told["kind"] == "elastic" and told["directory"] == str(family) and told["dtypes"] == ["float32"]
    assert told["parameters"] == numbers_in(family)
    assert told["bytes"] == (family / "model.safetensors").stat().st_size
    assert list(told["budgets"]) == list(MEMBERS)
    for name, entry in told["budgets"].items():
        extract_submodel(family, name, tmp_path / name)
        assert entry["parameters"] == numbers_in(tmp_path / name)
        assert entry["share"] == pytest.approx(entry["parameters"] / told["parameters"])
        own = json.loads(call("inspect", "--json", tmp_path / name))  # of which "uneven" has lists in its config
        assert own["kind"] == "plain" and own["budgets"] is None
        assert own["parameters"] == entry["parameters"] and own["widths"] == entry["widths"]
        assert own["pattern"] == entry["pattern"].replace("·", "")
    assert told["budgets"]["uneven"]["pattern"] == "M-*·-"
    assert told["budgets"]["uneven"]["widths"]["intermediate_size"] == [13, 4]
    assert told["budgets"]["small"]["widths"]["intermediate_size"] is None  # it has no such layers
    assert told["written_by"]["stage"] == "train_extended" and told["written_by"]["md5"] == "abc.dir"
    assert told["written_by"]["seed"] == 7


def test_inspect_shows_it_to_people(family):
    lines = call("inspect", family).splitlines()
    row = next(line for line in lines if line.startswith("uneven")).split()
    expected = json.loads(call("inspect", "--json", family))["budgets"]["uneven"]
    assert row[3] == f"{expected['parameters']:,}" and row[4] == "4/5" and row[-1] == "M-*·-"
    assert any("train_extended" in line and "abc.dir" in line for line in lines)


@pytest.mark.parametrize("seed", range(4))
def test_inspect_of_any_parent(tmp_path, seed):
    random_elastic(seed).save_pretrained(tmp_path / "parent")
    extract_submodel(tmp_path / "parent", random_submodel(random_config(seed), seed), tmp_path / "model")
    for name in ("parent", "model"):
        assert json.loads(call("inspect", "--json", tmp_path / name))["parameters"] == numbers_in(tmp_path / name)


def test_inspect_notices_files_that_are_not_what_the_configuration_says(tmp_path, family):
    extract_submodel(family, "small", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 13}))
    assert "has shape" in error_of("inspect", tmp_path / "model")
    path.write_text("{")
    assert str(path) in error_of("inspect", tmp_path / "model")


# --- extract ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"heterogeneous": "pad"}])
def test_extract_is_the_librarys(tmp_path, monkeypatch, family, options):
    arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
    monkeypatch.chdir(tmp_path)  # relative paths are the caller's
    told = call("extract", family, "ours", "--budget", "uneven", *arguments)
    dtype = getattr(torch, options.pop("dtype", ""), None)
    extract_submodel(family, "uneven", "theirs", dtype=dtype, **options)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    for path in ours.iterdir():
        assert path.read_bytes() == (theirs / path.name).read_bytes(), path
    assert f"{elastic_checkpoint.read(family)['budgets']['uneven']['num_parameters']:,} parameters" in told
    assert f"{(ours / 'model.safetensors').stat().st_size:,} bytes" in told


def test_extract_replaces_nothing_unasked(tmp_path, family):
    call("extract", family, tmp_path / "model", "-b", "small")
    assert "--force" in error_of("extract", family, tmp_path / "model", "-b", "full")
    # A single path is where the model goes: nobody loses a parent by taking it for the other one.
    assert "exists" in error_of("extract", tmp_path / "model", "-b", "small")
    call("extract", family, tmp_path / "model", "-b", "full", "--force")
    assert numbers_in(tmp_path / "model") == numbers_in(family)
    assert "contains it" in error_of("extract", family, family, "-b", "small", "--force")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["--budget", "full, uneven, small", "0.75", "9B"]),
        (["-b", "tiny"], ["'tiny'", "full, uneven, small"]),
        (["-b", "0.0001"], ["'0.0001'", "the nearest submodel has", "; --nearest takes it"]),
    ],
)
def test_a_wrong_budget_is_answered_with_those_there_are(tmp_path, family, arguments, words):
    text = error_of("extract", family, tmp_path / "model", *arguments)
    assert all(word in text for word in words) and not (tmp_path / "model").exists()


def test_the_nearest_model_is_taken_if_asked(tmp_path, family):
    call("extract", family, tmp_path / "nearest", "-b", "0.0001", "--nearest")
    call("extract", family, tmp_path / "small", "-b", "small")
    assert numbers_in(tmp_path / "nearest") == numbers_in(tmp_path / "small")
    prompt = ["generate", "w0 w1", "-m", family, "-n", 5]
    assert call(*prompt, "-b", "0.0001", "--nearest") == call(*prompt, "-b", "small")
    assert "--nearest: needs --budget" in error_of("generate", "w0", "-m", family, "--nearest")
    assert "--nearest takes it" in error_of_generate("-m", family, "-b", "0.0001")


def test_paths_that_are_no_family(tmp_path, family):
    assert "no config.json" in error_of("extract", tmp_path, tmp_path / "out", "-b", "small")
    assert "no such directory" in error_of("inspect", tmp_path / "nothing")
    assert "3 paths" in error_of("extract", family, family, tmp_path / "out")
    extract_submodel(family, "small", tmp_path / "model")
    assert "has no budgets" in error_of("extract", tmp_path / "model", tmp_path / "out", "-b", "small")


# --- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", MEMBERS)
def test_generate_prints_what_transformers_generates(tmp_path, family, budget):
    extract_submodel(family, budget, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=budget == "uneven")
    ids = torch.tensor([[1, 2, 3]])
    expected = model.generate(input_ids=ids, attention_mask=ids > 0, max_new_tokens=9, do_sample=False, pad_token_id=0)
    words = [WORDS[token] for token in expected[0, 3:] if token > 0]
    prompt = ["w0 w1 w2", "--max-new-tokens", 9]
    assert call("generate", "--model", family, "--budget", budget, *prompt).split() == words
    assert call("generate", "--model", tmp_path / "model", *prompt).split() == words
    sampled = call("generate", "--model", tmp_path / "model", *prompt, "--temperature", 5)
    assert set(sampled.split()) <= set(WORDS)


def test_generate_says_what_is_missing(tmp_path, family):
    extract_submodel(family, "uneven", tmp_path / "model")
    assert "not a family" in error_of_generate("-m", tmp_path / "model", "-b", "small")
    assert "full, uneven, small" in error_of_generate("-m", family)
    assert "--max-new-tokens" in error_of_generate("-m", family, "-b", "small", "-n", 0)
    assert "--temperature" in error_of_generate("-m", family, "-b", "small", "-t", -1)
    code = next((tmp_path / "model").glob("*.py"))
    code.write_text("raise SystemExit('foreign code ran')")
    assert "did not write" in error_of_generate("-m", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert "no tokenizer" in error_of_generate("-m", tmp_path / "model")


def error_of_generate(*arguments):
    """The last line: the first says which model it is."""
    text = call("generate", "w0", *arguments, status=1)
    assert text.count("\n") == 2
    return text.splitlines()[1]
