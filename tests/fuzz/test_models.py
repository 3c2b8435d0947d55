"""Model directories with broken files: read, or refused by one message that names the directory."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic_core.data.tokenizer import load_tokenizer
from elastic_core.errors import UserError
from elastic_core.model import hf
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.model.parent_files import check_logits, check_parent_files
from tasks.commands.generate import Chat, generate
from tasks.commands.inspect import inspect_checkpoint
from tests.support.fuzzing import directories
from tests.support.fuzzing.broken import broken_file, broken_tensors, header_of, json_values
from tests.support.fuzzing.calls import call, examples

IDS = torch.arange(4)[None]


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A scratch directory with a parent of every architecture, which reads without an error."""
    scratch = tmp_path_factory.mktemp("models")
    for name in directories.CONFIGS:
        read(scratch, directories.write_parent(scratch / name, name), "valid")
    return scratch


def read(scratch, directory, target: str) -> dict:
    """What the readers of a model directory make of it."""

    def compute():
        check_logits(ElasticModel.from_pretrained(directory), IDS, str(directory))

    readers = {
        "read_config": lambda: hf.read_config(directory),
        "check_parent_files": lambda: check_parent_files(directory),
        "inspect": lambda: inspect_checkpoint(directory),
        "generate": lambda: generate(directory, None, "ab", 1),
        "from_pretrained": compute,
    }
    ends = {name: call(f"{target}: {name}", scratch, reader, directory) for name, reader in readers.items()}
    if target == "valid":
        assert not any(isinstance(end, UserError) for end in ends.values()), ends
    return ends


def nested(levels: int) -> list:
    return [nested(levels - 1)] if levels else []


ROPE = {"rope_type": "default", "rope_theta": 1e4}
FOUND = [  # values that had been accepted, or had ended in another error
    *(("llama", {name: size}) for name in ("num_hidden_layers", "head_dim", "vocab_size") for size in (10**9, 10**30)),
    *(("qwen3", {"rope_parameters": ROPE | {"rope_theta": theta}}) for theta in ([1], {"a": 1}, "x", 0.0)),
    *(("llama", change) for change in ({"head_dim": 3}, {"dtype": []}, {"configuration_files": ["config.x.json"]})),
    *(("llama", {"intermediate_size": sizes}) for sizes in ([], [None], ["x"], [10**30], [1, 2, 3])),
    ("llama", {"model_type": {"a": "x" * 5000}}),
    ("qwen2", {"hidden_size": 1}),
    *(
        ("nemotron_h", change)
        for change in ({"mamba_num_heads": -2}, {"mlp_hidden_act": "x"}, {"layers_block_type": []})
    ),
    *(("nemotron_h", {"chunk_size": size}) for size in (0, -1, 2**31, 2**63 - 1)),
    *(("nemotron_h", {"routed_scaling_factor": factor}) for factor in (10**30, -(10**400))),
    ("nemotron_h", {"time_step_min": 1e308}),
    *(("llama", {"pad_token_id": token}) for token in (9, -10)),
    ("qwen3", {"other": nested(800)}),
]


@pytest.mark.parametrize("architecture, change", FOUND)
def test_values_of_config_that_were_found(parents, architecture, change):
    directory = directories.copy(parents / architecture, parents / "found")
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | change))
    ends = read(parents, directory, "found")
    del ends["read_config"]  # a size may be possible, but be another one than in the files
    assert all(isinstance(end, UserError) for end in ends.values()), ends


@pytest.mark.parametrize(
    "architecture, change", [("nemotron_h", {"mamba_num_heads": [2]}), ("qwen2", {"num_attention_heads": [2, 2]})]
)
def test_widths_per_layer_without_their_modeling_file(parents, architecture, change):
    """They can be described, but no class of transformers reads them."""
    directory = directories.copy(parents / architecture, parents / "found")
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | change))
    assert isinstance(read(parents, directory, "found")["generate"], UserError)
    with_chat = call("found", parents, lambda: generate(directory, None, "ab", 1, chat=Chat()), directory)
    assert isinstance(with_chat, UserError)


@pytest.mark.parametrize("architecture", directories.CONFIGS)
def test_config(parents, architecture):
    file = parents / architecture / "config.json"
    valid = file.read_bytes()

    @examples(16)
    @given(content=broken_file(json.loads(valid)))
    def check(content):
        file.write_bytes(content)
        read(parents, file.parent, f"config.json {architecture}")

    with directories.restored(file):
        check()


BAD_TOKENIZERS = [
    {"truncation": "None"},
    {"padding": {}},
    {"added_tokens": [{"id": 0, "content": "a"}]},
    {"post_processor": {"type": "x"}},
    {"model": {"type": "WordLevel", "vocab": {"a": 0.5}, "unk_token": "a"}},
    {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "a"}},
    ('"lstrip"', '"lstrip": false, "lstrip"'),
]


@pytest.mark.parametrize("change", BAD_TOKENIZERS)
def test_tokenizers_that_were_found(parents, change):
    """The library tokenizers raises a plain Exception for them, which names no file."""
    directory = directories.copy(parents / "llama", parents / "found")
    text = (directory / "tokenizer.json").read_text()
    broken = json.dumps(json.loads(text) | change) if isinstance(change, dict) else text.replace(*change)
    (directory / "tokenizer.json").write_text(broken)
    for reader in (load_tokenizer, check_parent_files):
        end = call("found", parents, lambda reader=reader: reader(directory), directory / "tokenizer.json")
        assert isinstance(end, UserError)


@pytest.mark.parametrize("architecture", directories.CONFIGS)
def test_safetensors(parents, architecture):
    file = parents / architecture / "model.safetensors"
    valid = file.read_bytes()

    @examples(8)
    @given(content=broken_tensors(valid))
    def check(content):
        file.unlink()  # an earlier call may have mapped it
        file.write_bytes(content)
        read(parents, file.parent, "safetensors")

    with directories.restored(file):
        check()


@examples(16)
@given(data=st.data())
def test_index(parents, data):
    directory = directories.copy(parents / "llama", parents / "sharded")
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    header, _ = header_of((directory / "model-00001-of-00001.safetensors").read_bytes())
    index = {"weight_map": dict.fromkeys(header.keys() - {"__metadata__"}, "model-00001-of-00001.safetensors")}
    (directory / "model.safetensors.index.json").write_bytes(data.draw(broken_file(index)))
    read(parents, directory, "index")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_tokenizer_files(parents, name):
    file = parents / "llama" / name
    valid = file.read_bytes()

    @examples(12)
    @given(content=broken_file(json.loads(valid)) | json_values.map(json.dumps).map(str.encode))
    def check(content):
        file.write_bytes(content)
        call(name, parents, lambda: load_tokenizer(file.parent), file.parent)
        call(f"{name}: check_parent_files", parents, lambda: check_parent_files(file.parent), file.parent)

    with directories.restored(file):
        check()
