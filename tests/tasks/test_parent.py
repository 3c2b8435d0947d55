"""Stage parent: an imported parent that cannot be used is refused before it is written."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from elastic_core import ElasticModel
from elastic_core.config import ConfigError, load
from elastic_core.cost.metrics import num_parameters
from elastic_core.data.loader import TokenData
from elastic_core.errors import UserError
from elastic_core.io.fingerprints import DigestCache
from elastic_core.io.tokenizer_files import copy_tokenizer
from elastic_core.model import hf, norm_gains
from tasks import fingerprint, parent
from tasks.parents.config import read_parent_config
from tasks.parents.tokenizer import load_tokenizer
from tasks.prepare_data import prepare
from tasks.settings.load import read
from tasks.settings.parts.parent import Parent
from tasks.settings.sections import Benchmarks, Evaluate
from tests.support.committed_params import COMMITTED, put, use_parent, write
from tests.support.models.chat_templates import CHATML, LLAMA3, chat_tokenizer
from tests.support.models.parents import random_ids, random_ratios, relative_error, save_random_parent
from tests.support.pipeline.corpora import configure, texts, write_jsonl
from tests.support.pipeline.stages import check_parameters, run_stage

SINGLE = "model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_jsonl(root / "a.jsonl", texts(300))
    source = {"kind": "files", "path": str(root / "a.jsonl"), "held_out": 0.1}
    prepare(configure({"mine": source}), None, root / "data", seed=0)
    return TokenData(root / "data")


TIED = LlamaConfig(
    vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    intermediate_size=24, tie_word_embeddings=True, max_position_embeddings=64, eos_token_id=0, bos_token_id=0,
)  # fmt: skip


@pytest.fixture
def tied(data, tmp_path, monkeypatch):
    """A tied Llama with the tokenizer of the data, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    save_random_parent(tmp_path / "tied", 0, TIED)
    copy_tokenizer(data.directory / "tokenizer", tmp_path / "tied")
    return tmp_path / "tied"


def change(directory, edit) -> None:
    tensors = load_file(directory / SINGLE)
    edit(tensors)
    save_file(tensors, directory / SINGLE, {"format": "pt"})


def stages(evaluate):
    """Parameters of the stages that read the data, with a parent at a URL."""
    section = SimpleNamespace(mixture={"mine": 1.0}, sequence_length=8)
    return SimpleNamespace(
        parent=Parent("s3://models/mine"), rank=section, train_short=section, train_extended=section, seed=0,
        evaluate=evaluate,
    )  # fmt: skip


def test_held_out_data_that_evaluation_cannot_read_are_refused_before_any_training(tmp_path):
    """Conversations that are all too long, or whose answers begin after what is read of them."""
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    messages = [{"role": "user", "content": "q" * 60}, {"role": "assistant", "content": "four"}]
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    paths = {"path": str(tmp_path / "train.jsonl"), "held_out_path": str(tmp_path / "held_out.jsonl")}
    for too_long, message in (
        ("drop", r"evaluate\.sequence_length: .*mine/held_out: no document fits sequence_length 40"),
        ("truncate", r"evaluate\.held_out: mine has no trained token .* raise evaluate\.sequence_length \(40\)"),
    ):
        source = {"kind": "conversations", "too_long": too_long, **paths}
        prepare(configure({"mine": source}), tmp_path / "tokenizer", tmp_path / too_long, seed=0)
        data = TokenData(tmp_path / too_long)
        settings = stages(Evaluate(("mine",), (), sequence_length=40))
        settings.rank.sequence_length = 256
        with pytest.raises(ConfigError, match=rf"^params\.yaml: .*{message}"):
            parent.check_stages(settings, data)
        for batch_size in (4, "auto"):
            settings.evaluate = Evaluate(("mine",), (), sequence_length=256, batch_size=batch_size)
            parent.check_stages(settings, data)


def test_tasks_and_benchmarks_without_a_chat_template_are_refused_before_any_training(data, tmp_path):
    """With a parent at a URL or in a package, the tokenizer is known only now."""
    shutil.copytree(data.directory, tmp_path / "data")
    (tmp_path / "data/tokenizer/chat_template.jinja").unlink(missing_ok=True)
    settings = stages(Evaluate(("mine",), ()))
    parent.check_stages(settings, TokenData(tmp_path / "data"))
    settings.evaluate = Evaluate(("mine",), (), benchmarks=Benchmarks(("gsm8k",), apply_chat_template=True))
    with pytest.raises(
        UserError, match=r"benchmarks\.apply_chat_template \(s3://models/mine\): .* has no chat template"
    ):
        parent.check_stages(settings, TokenData(tmp_path / "data"))
    settings.evaluate = Evaluate(("mine",), ("chains_3",))
    words = r"^params\.yaml: evaluate\.tasks \(s3://models/mine\): .* has no chat template; copy chat_template\.jinja"
    with pytest.raises(UserError, match=words):
        parent.check_stages(settings, TokenData(tmp_path / "data"))
    parent.check_stages(settings, data)  # a tokenizer that is trained here has one


def test_a_family_knows_its_parents_licence_and_element_type(data, tied, tmp_path, capsys):
    """Also from a download. What it does not keep of the parent's files is said."""
    change(tied, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}))
    (tied / "README.md").write_text("---\nlicense: llama3\n---\n# Parent\n")
    for name in ("LICENSE", "answer_parser.py", "figure.png"):
        (tied / name).write_text(name)
    parent.import_parent(Parent(f"file://{tied}"), data)
    out = tmp_path / "artifacts/parent"
    assert "parent: files that the family does not keep: figure.png\n" in capsys.readouterr().out
    assert {"LICENSE", "answer_parser.py"} <= {path.name for path in out.iterdir()}
    assert not {"README.md", "figure.png"} & {path.name for path in out.iterdir()}
    assert json.loads((out / "parent_card.json").read_text()) == {"license": "llama3"}
    assert json.loads((out / "config.json").read_text())["parent_dtype"] == "bfloat16"


def test_the_time_step_is_clamped_where_the_section_says_so(data, tied, tmp_path):
    """Only where there is a time step. A parent that is trained here has its limits in `parent.model`."""
    model = read(COMMITTED, "params.yaml").parent
    assert tuple(read_parent_config(model, 64).time_step_limit) == (0.001, 1e30)
    model = dataclasses.replace(model, model=dataclasses.replace(model.model, time_step_limit=(0.0, math.inf)))
    assert tuple(read_parent_config(model, 64).time_step_limit) == (0.0, math.inf)
    with pytest.raises(ConfigError, match=r"clamp_time_step: got True; allowed: false without parent\.path"):
        load(Parent, {"path": None, "clamp_time_step": True}, "parent")
    read_parent_config(model, 64).save_pretrained(tmp_path / "hybrid")
    for clamp, lower in ((False, 0.0), (True, 0.001)):
        found = read_parent_config(Parent(str(tmp_path / "hybrid"), clamp_time_step=clamp), 64)
        assert tuple(found.time_step_limit) == (lower, math.inf)
    with pytest.raises(UserError, match="clamp_time_step: a llama has no Mamba layers and no time step; set it to f"):
        parent.import_parent(Parent(str(tied), clamp_time_step=True), data)


def test_templates_with_names_are_files_of_the_tokenizer(tied, tmp_path):
    """At a URL and in a download they are as in the directory, and the data depend on them, but on no weights."""
    tokenizer, templates = load_tokenizer(tied), {"default": CHATML, "tool_use": LLAMA3}
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(tied)
    parent.download_parent(f"file://{tied}", tmp_path / "copy")
    for place in (f"file://{tied}", tmp_path / "copy"):
        assert load_tokenizer(place).chat_template == templates

    def seen():
        settings = SimpleNamespace(parent=Parent(str(tied)))
        return fingerprint.tokenizer(settings, DigestCache(tmp_path / "digests.json"))

    first = seen()
    change(tied, lambda tensors: tensors.popitem())
    assert seen() == first
    (tied / "additional_chat_templates/tool_use.jinja").write_text(CHATML)
    assert seen() != first


@pytest.mark.parametrize("url", [False, True])
def test_a_second_copy_of_tied_embeddings_is_left_out_and_the_stage_says_so(data, tied, url, capsys):
    location = f"file://{tied}" if url else str(tied)
    parent.import_parent(Parent(location), data)
    assert "lm_head" not in capsys.readouterr().out
    expected = load_file(parent.OUT / SINGLE)
    change(tied, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    parent.import_parent(Parent(location), data)
    assert "parent: lm_head.weight equals the embeddings, and config.json ties them" in capsys.readouterr().out
    found, ids = load_file(parent.OUT / SINGLE), random_ids(LlamaConfig(vocab_size=300), 0)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    models = [AutoModelForCausalLM.from_pretrained(directory) for directory in (tied, parent.OUT)]
    assert torch.equal(*(model(ids).logits for model in models))


@pytest.mark.parametrize("url", [False, True])
def test_a_sorted_model_is_imported_without_the_gains_of_its_submodels(data, tied, url):
    random_ratios(hf.read_config(tied)).write(tied)
    parent.import_parent(Parent(f"file://{tied}" if url else str(tied)), data)
    assert parent.OUT.is_dir() and not (parent.OUT / norm_gains.FOLDER).exists()


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t["model.norm.weight"].fill_(float("nan")), r"1 of 20 tensors hold NaN .*: model\.norm\.weight"),
        (lambda t: [tensor.zero_() for tensor in t.values()], "same for every token; 20 tensors are all zero"),
        (lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}), r"lm_head\.weight differs"),
    ],
)  # fmt: skip
def test_a_parent_with_unusable_weights_is_not_imported(data, tied, edit, message):
    change(tied, edit)
    with pytest.raises(UserError, match=message):
        parent.import_parent(Parent(str(tied)), data)
    assert not parent.OUT.exists()


@pytest.fixture
def tied_values(values, tied):
    """Parameters with that parent."""
    use_parent(values, tied)
    put("choices", "intermediate_size", [24, 20, 16, 12, 8])(values)
    put("choices", "hidden_size", [16])(values)
    put("budgets", {"full": 1.0, "medium": 0.912, "small": 0.824})(values)
    put("extract", "heterogeneous", "pad")(values)
    put("rank", "basis", "channels")(values)
    return values


def test_damaged_files_are_refused_by_the_check_and_by_the_first_stage(tied_values, tied, monkeypatch):
    write(tied_values, tied.parent, monkeypatch)
    check_parameters()
    (tied / SINGLE).write_bytes((tied / SINGLE).read_bytes()[:-1])
    for refuse in (check_parameters, lambda: run_stage("prepare_data")):
        with pytest.raises(SystemExit, match=r"^error: params\.yaml: parent\.path: .*model\.safetensors: is truncated"):
            refuse()
    assert not Path("artifacts").exists()


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize("section", ["rank", "train_short", "train_extended", "evaluate"])
def test_sequences_beyond_the_parents_positions_are_refused_or_scaled(tied_values, tied, section, monkeypatch):
    put(section, "sequence_length", 65)(tied_values)
    write(tied_values, tied.parent, monkeypatch)
    for refuse in (check_parameters, lambda: run_stage("prepare_data")):
        with pytest.raises(
            SystemExit, match=rf"params\.yaml: {section}\.sequence_length: got 65; allowed: up to 64, .*rope"
        ):
            refuse()
    put("parent", "rope_scaling", YARN)(tied_values)
    write(tied_values, tied.parent, monkeypatch)
    check_parameters()


def test_the_imported_parent_has_the_scaling(data, tied):
    parent.import_parent(Parent(str(tied), rope_scaling=YARN), data)
    config, ids = hf.read_config(parent.OUT), random_ids(LlamaConfig(vocab_size=300), 0, (1, 200))
    assert config.max_position_embeddings == 256 and YARN.items() <= config.rope_parameters.items()
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(parent.OUT)(ids).logits
        assert relative_error(ElasticModel.from_pretrained(parent.OUT)(ids), expected) < 1e-5


@pytest.mark.parametrize("has_copy", [False, True])
def test_an_untied_parent_computes_the_same_and_has_the_parameters_of_its_head(data, tied, has_copy, capsys):
    """Whether or not the files have a copy of the embeddings as the head."""
    if has_copy:
        change(tied, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    parent.import_parent(Parent(str(tied), untie_head=True), data)
    assert "ties them" not in capsys.readouterr().out
    config, tensors, ids = hf.read_config(parent.OUT), load_file(parent.OUT / SINGLE), random_ids(TIED, 0)
    assert not config.tie_word_embeddings and torch.equal(
        tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    )
    models = [AutoModelForCausalLM.from_pretrained(directory) for directory in (tied, parent.OUT)]
    assert torch.equal(*(model(ids).logits for model in models))
    head = TIED.vocab_size * TIED.hidden_size
    counts = [sum(tensor.numel() for tensor in model.parameters()) for model in models]
    assert counts[1] == num_parameters(config) == counts[0] + head == num_parameters(hf.read_config(tied)) + head


def tied_embeddings(values, tied):
    put("rank", "basis", "principal")(values)


def no_head_to_untie(values, tied):
    """The parent has a head of its own already."""
    put("parent", "untie_head", True)(values)
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    change(tied, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))


def no_parent_to_untie(values, tied):
    """The parent is trained here."""
    values["parent"] = COMMITTED["parent"] | {"untie_head": True}


@pytest.mark.parametrize(
    "make, message",
    [
        (tied_embeddings, r"rank\.basis: principal .* tied .* set parent\.untie_head: true.* channels"),
        (no_head_to_untie, r"parent\.untie_head: got True; allowed: false, because the parent's head is not tied"),
        (no_parent_to_untie, r"parent\.untie_head: got True; allowed: false without parent\.path"),
    ],
    ids=["tied", "untied already", "trained here"],
)
def test_the_head_and_the_basis_have_to_fit_each_other(tied_values, tied, data, make, message, monkeypatch):
    make(tied_values, tied)
    write(tied_values, tied.parent, monkeypatch)
    shutil.copytree(data.directory, parent.DATA)
    for refuse in (check_parameters, lambda: run_stage("parent")):
        with pytest.raises(SystemExit, match=rf"^error: params\.yaml: {message}"):
            refuse()
    assert not parent.OUT.exists()


def test_the_principal_axes_of_a_tied_parent_need_its_head_untied(tied_values, tied, monkeypatch, capsys):
    put("rank", "basis", "principal")(tied_values)
    put("parent", "untie_head", True)(tied_values)
    put("budgets", {"full": 1.0, "medium": 0.943, "small": 0.886})(tied_values)  # the same MLPs of more parameters
    write(tied_values, tied.parent, monkeypatch)
    check_parameters()
    assert capsys.readouterr().out == "params.yaml is valid\n"


@pytest.mark.parametrize(
    "section, message",
    [
        ({"path": "x", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, r"here\.rope_scaling\.rope_type: got"),
        ({"path": None, "rope_scaling": YARN}, r"here\.rope_scaling: got .*; allowed: null without parent\.path"),
    ],
)  # fmt: skip
def test_scalings_that_are_not_possible(section, message):
    with pytest.raises(ConfigError, match=message):
        load(Parent, section, "here")
