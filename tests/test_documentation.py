"""README and docs: every command, option, path, parameter and link exists, and what is quick is run.

Fenced blocks are tried by their language: bash, json, python and yaml. Blocks of language text are output or drawings.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import re
import types
import typing
from pathlib import Path

import pytest
import torch
import typer
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from elastic_core.cost import num_parameters
from elastic_core.export import elastic_checkpoint
from elastic_core.model import hf
from elastic_core.search.path import path_between
from elastic_core.search.selection import Member
from elastic_core.search.space import ElasticSpace
from flows.cli.app import app
from tasks.commands import find_family
from tasks.corpora.conversations.messages import Fields, conversation
from tasks.parents.config import new_config
from tasks.serving.family import Family
from tasks.serving.jobs import Limits
from tasks.settings import replaced
from tasks.settings.load import read
from tasks.settings.merging import merge, profile_names
from tasks.settings.schema import Params
from tests.support import documentation
from tests.support.committed_params import COMMITTED, ROOT
from tests.support.documentation import OWN, PACKAGES, PAGES, README, blocks_of, commands, name_of, spans, split_page
from tests.support.models.parents import random_elastic
from tests.support.models.running_server import running_server
from tests.support.pipeline.command_line import call, error_of

OTHERS = [ROOT / "benchmarks/NOTES.md", *sorted((ROOT / "benchmarks/results").glob("*.md"))]  # only links are tried
SERVER = "http://127.0.0.1:8000"  # of `elastic serve`
LANGUAGES = {"bash", "json", "python", "yaml", "text"}


def labels(cases) -> list[str]:
    return [f"{where} {' '.join(map(str, words))[:60]}" for where, words in cases]


# --- shell commands --------------------------------------------------------------------------------------------------


ALL_COMMANDS = [(str(block), command) for block in blocks_of("bash") for command in commands(block.text)]
SPAN_COMMANDS = [
    (name_of(page), command)
    for page in PAGES
    for span in spans(page)
    if re.match(rf"(\.venv/bin/)?({'|'.join(OWN)}) ", span)
    for command in commands(span)
]


@pytest.mark.parametrize(("where", "command"), ALL_COMMANDS, ids=labels(ALL_COMMANDS))
def test_every_command_in_a_block_exists(where, command):
    documentation.check_command(command, complete=True)


@pytest.mark.parametrize(("where", "command"), SPAN_COMMANDS, ids=labels(SPAN_COMMANDS))
def test_every_command_in_the_text_exists(where, command):
    documentation.check_command(command, complete=False)


def test_the_readme_has_all_commands_once():
    rows = re.findall(r"^\| `elastic (\w+)", README.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(typer.main.get_command(app).commands)


# --- parameters and YAML ---------------------------------------------------------------------------------------------


PARAMETERS = sorted(
    {
        (name_of(page), found[1])
        for page in PAGES
        for span in spans(page)
        if (found := re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)*)(: .+)?", span))
        and found[1].split(".")[0] in typing.get_type_hints(Params)
    }
)


@pytest.mark.parametrize(("page", "path"), PARAMETERS, ids=labels([(p, [n]) for p, n in PARAMETERS]))
def test_every_parameter_exists(page, path):
    documentation.check_parameter(path)


@pytest.mark.parametrize("block", blocks_of("yaml"), ids=str)
def test_every_yaml_block_is_valid(block):
    content = yaml.safe_load(block.text)
    if "apiVersion" in content:
        return  # of Kubernetes
    assert content.keys() <= {field.name for field in dataclasses.fields(Params)}
    values, new_sources = copy.deepcopy(COMMITTED), content.get("prepare_data", {}).pop("sources", {})
    merge(values, content)
    values["prepare_data"]["sources"] |= new_sources
    read(values, str(block))


@pytest.mark.parametrize("block", blocks_of("json"), ids=str)
def test_every_json_block_is_a_row_with_a_conversation(block):
    found = conversation(json.loads(block.text), Fields(), str(block))
    assert [message["role"] for message in found.messages] == ["user", "assistant"]


def test_configuration_has_every_parameter():
    named = {word for span in spans(ROOT / "docs/configuration.md") for word in re.findall(r"\w+", span)}
    assert documentation.fields_below(Params, set()) - named == set()


def test_configuration_has_every_profile_and_every_replaced_parameter():
    named = spans(ROOT / "docs/configuration.md")
    rows = re.findall(r"^\| `([\w.-]+)` \|", (ROOT / "docs/configuration.md").read_text().split("## ")[1], re.MULTILINE)
    assert sorted(rows) == sorted(profile_names())
    for path in replaced.KEYS:
        assert any(path.rpartition(".")[2] in span for span in named), path
    assert all(f"{path}: {old}" in named for path, old in replaced.VALUES)


# --- paths, links and modules ----------------------------------------------------------------------------------------


PATHS = sorted(
    {(name_of(page), span) for page in PAGES for span in spans(page) if documentation.looks_like_a_path(span)}
)


@pytest.mark.parametrize(("page", "path"), PATHS, ids=labels([(p, [n]) for p, n in PATHS]))
def test_every_path_exists(page, path):
    documentation.check_path(path)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_module_exists(page):
    for span in spans(page):
        if re.fullmatch(rf"({'|'.join([*PACKAGES, 'benchmarks'])})(\.\w+)+", span):
            documentation.check_module(span)


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", split_page(page)[1]):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in documentation.anchors(file), f"{page}: {target}"


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", README.read_text()))
    assert linked == {name_of(page) for page in PAGES[1:]}


def test_every_image_is_shown():
    text = "".join(page.read_text() for page in PAGES)
    assert all(f"]({image.name})" in text for image in (ROOT / "docs").glob("*.png"))


# --- the README ------------------------------------------------------------------------------------------------------


def test_the_readme_can_be_read_in_one_sitting():
    assert len(README.read_text().splitlines()) <= 200


def test_every_block_says_its_language():
    for page in PAGES:
        for block in split_page(page)[0]:
            assert block.language in LANGUAGES, block


def test_the_map_has_every_room():
    shown = next(block for block in split_page(README)[0] if "elastic_core/" in block.text).text
    for package in PACKAGES:
        part = shown[shown.index(f"\n{package}/") :]
        for room in documentation.rooms(package):
            stage = room.removesuffix(".py") if package == "tasks" else room  # files there are stages
            assert stage in part, f"{package}/{room}"


def test_the_results_are_those_of_the_committed_metrics():
    metrics = json.loads((ROOT / "reports/metrics.json").read_text())
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$", README.read_text(), re.MULTILINE)
    assert [row[0] for row in rows] == list(metrics)
    for name, parameters, loss, ratio in rows:
        assert int(parameters.replace(",", "")) == metrics[name]["parameters"]
        assert loss == f"{metrics[name]['loss']:.3f}"
        assert float(ratio) == pytest.approx(metrics[name]["latency_ratio"], abs=0.05)  # differs from run to run


# --- running it ------------------------------------------------------------------------------------------------------

# The default run's family: hidden size, FFN width, number of layers. Smaller members drop layer 4 and then layer 3.
BUDGETS = {"full": (128, 512, 8), "medium": (96, 384, 8), "small": (72, 384, 6)}
RANKING = (0, 1, 2, 5, 6, 7, 3, 4)
WORDS = [f"w{i}" for i in range(1021)]


def combination(space: ElasticSpace, hidden_size: int, intermediate_size: int, depth: int) -> list[int]:
    wanted = {"hidden": hidden_size, "ffn": intermediate_size, "depth": depth}
    return [slot.sizes.index(wanted.get(slot.axis, slot.sizes[0])) for slot in space.slots]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """What a default run leaves, with random weights: a parent, and a family with its tokenizer."""
    workspace = tmp_path_factory.mktemp("workspace")
    settings = read(COMMITTED, "params.yaml")
    config = new_config(settings.parent.model, settings.prepare_data.vocab_size, eos_token_id=0, pad_token_id=0)
    family = workspace / find_family.FAMILY
    for directory in (workspace / "artifacts/parent", family):
        random_elastic(0, config).save_pretrained(directory)
    space = ElasticSpace(config, settings.choices, RANKING)
    indices = {name: combination(space, *sizes) for name, sizes in BUDGETS.items()}
    members = {name: Member(settings.budgets[name], space.submodel(chosen)) for name, chosen in indices.items()}
    elastic_checkpoint.write(family, config, members, path_between(space, list(indices.values())))
    vocabulary = {word: i for i, word in enumerate(["<end>", "In", "the", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = "{% for message in messages %}In {{ message.content }} {% endfor %}{{ enable_thinking }} the"
    fast.save_pretrained(family)
    return workspace


@pytest.fixture
def inside(workspace, monkeypatch):
    """The working directory is the workspace, and its family that of the last run."""
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(find_family, "find", functools.partial(find_family.find, root=workspace))
    torch.manual_seed(0)
    return workspace


def moved(text: str, workspace: Path) -> str:
    """Text with its paths in /tmp moved to the workspace."""
    return text.replace("/tmp/", f"{workspace}/")


@pytest.mark.parametrize("block", blocks_of("python"), ids=str)
def test_every_python_block_runs(block, inside):
    call("extract", inside / "small", "--budget", "small", "--force")  # which the page of serving reads
    namespace = types.ModuleType("block").__dict__
    with contextlib.ExitStack() as running:
        text = moved(block.text, inside)
        if SERVER in text:
            address, _ = running.enter_context(running_server(Family(find_family.FAMILY), Limits()))
            text = text.replace(SERVER, address)
        exec(compile(text, str(block), "exec"), namespace)
    if block.page == "README.md":
        assert len(block.text.splitlines()) <= 14
        assert namespace["logits"].shape == (4, 64, 1024)


def test_the_quick_commands_run(inside):
    ran = []
    for where, (name, *words) in ALL_COMMANDS:
        if name == "elastic" and words[0] in ("inspect", "extract", "generate"):
            options = ["--force"] if words[0] == "extract" and "--force" not in words else []
            text = call(*[moved(word, inside) for word in words], *options)
            ran.append(words[0])
            if words == ["inspect"]:
                assert all(name in text for name in BUDGETS), where
    assert set(ran) == {"inspect", "extract", "generate"}


@pytest.mark.thorough
def test_budgets_in_between_are_served_as_the_page_says(inside):
    page = (ROOT / "docs/serving.md").read_text()
    config = hf.read_config(find_family.FAMILY)
    full, given = num_parameters(config), re.search(r"any share from ([.\d]+) to 1", page)[1]
    smallest = elastic_checkpoint.find_submodel(find_family.FAMILY, "small")
    assert round(num_parameters(config, smallest) / full, 3) == float(given)
    for share in [float(given) + 0.005 * step for step in range(114)] + [0.75]:
        served = elastic_checkpoint.find_submodel(find_family.FAMILY, share)
        assert abs(num_parameters(config, served) / full - share) <= 0.02 * share
    assert error_of("extract", inside / "in-between", "--budget", "0.35") in page
    call("extract", inside / "in-between", "--budget", "0.35", "--nearest")
