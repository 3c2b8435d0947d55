"""Files of a parent that are damaged, missing or of another kind: each is named, from headers alone, also at a URL."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from elastic_core import ElasticModel, Submodel, extract
from elastic_core.errors import UserError
from elastic_core.io import filesystem
from elastic_core.model import architectures, hf
from elastic_core.model.files.weights import convert_command
from elastic_core.model.parent_files import check_logits, check_parent_files, check_weights
from tests.support.marks import thorough
from tests.support.models.parents import random_config, random_ids, randomise, relative_error, save_random_parent

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 999999\n"
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def llama(tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=37, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=24, tie_word_embeddings=tied, max_position_embeddings=64,
    )  # fmt: skip


@pytest.fixture
def parent(tmp_path):
    save_random_parent(tmp_path / "parent", 0, llama(tied=False))
    return tmp_path / "parent"


def split_in_shards(directory) -> list[str]:
    """Split the single file into two, with an index; returns their names."""
    tensors = load_file(directory / SINGLE)
    names, files = sorted(tensors), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shards = [names[: len(names) // 2], names[len(names) // 2 :]]
    for file, shard in zip(files, shards, strict=True):
        save_file({name: tensors[name] for name in shard}, directory / file)
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / SINGLE).unlink()
    return files


def cut(path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def change_header(path, change) -> None:
    """Rewrite a safetensors file's header, with its tensors unchanged."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


DAMAGE = {  # what is done to a directory with one file, and what the message says
    "truncated": (
        lambda d: cut(d / SINGLE, -1),
        r"model\.safetensors: is truncated: it has [\d,]+ bytes, and its header",
    ),
    "truncated header": (lambda d: cut(d / SINGLE, 300), r"model\.safetensors: is truncated or not a safetensors file"),
    "truncated length": (lambda d: cut(d / SINGLE, 5), r"model\.safetensors: is truncated or not a safetensors file"),
    "empty": (lambda d: cut(d / SINGLE, 0), r"model\.safetensors: is empty"),
    "longer": (
        lambda d: (d / SINGLE).write_bytes((d / SINGLE).read_bytes() + b"x"),
        r"model\.safetensors: is too long",
    ),
    "LFS": (lambda d: (d / SINGLE).write_bytes(LFS), r"model\.safetensors: is a git-LFS pointer.* `git lfs pull`"),
    "HTML": (lambda d: (d / SINGLE).write_text("\n<!doctype html><html>"), r"model\.safetensors: is a web page"),
    "torch": (lambda d: torch.save({"a": torch.zeros(1)}, d / SINGLE), r"model\.safetensors: is a PyTorch or zip file"),
    "noise": (
        lambda d: (d / SINGLE).write_bytes(b"\3" + bytes(7) + b"abc" * 9),
        "is not a safetensors file, or its header",
    ),
    "offsets": (
        lambda d: change_header(d / SINGLE, lambda h: h[HEAD].update(data_offsets=[4, 8])),
        r"model\.safetensors: is not a safetensors file, or its header is damaged",
    ),
    "shape": (
        lambda d: change_header(d / SINGLE, lambda h: h[HEAD].update(shape=[16, 37])),
        r"lm_head\.weight has shape \(16, 37\); config\.json says \(37, 16\)",
    ),
    "no file": (lambda d: (d / SINGLE).unlink(), r"no model\.safetensors and no model\.safetensors\.index\.json"),
    "no tensor": (lambda d: change_header(d / SINGLE, lambda h: h.update(x=h.pop(HEAD))), "not expected: .'x'"),
    "LFS config": (lambda d: (d / "config.json").write_bytes(LFS), r"config\.json: is not valid JSON"),
    "generation": (lambda d: (d / "generation_config.json").write_text("{"), r"generation_config\.json: is not valid"),
    "tokenizer": (lambda d: (d / "tokenizer.json").write_bytes(b"\xff"), r"tokenizer\.json: is not valid JSON"),
    "special": (
        lambda d: (d / "special_tokens_map.json").write_text("[]"),
        "special_tokens_map.json: holds a JSON list",
    ),
}


@pytest.mark.parametrize("url", [False, True])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_without_reading_weights(parent, kind, url):
    location = f"file://{parent}" if url else str(parent)
    check_parent_files(location)
    damage, message = DAMAGE[kind]
    damage(parent)
    with pytest.raises(UserError, match=message) as error:
        check_parent_files(location)
    assert str(location) in str(error.value)


@pytest.mark.parametrize("url", [False, True])
def test_what_is_wrong_with_shards_is_named(parent, url):
    location = f"file://{parent}" if url else str(parent)
    first, second = split_in_shards(parent)
    check_parent_files(location)
    index, kept = (parent / INDEX).read_text(), (parent / second).read_bytes()
    (parent / second).unlink()
    with pytest.raises(UserError, match=rf"lacks 1 of the 2 files that {INDEX} names, with \d+ tensors: {second}"):
        check_parent_files(location)
    (parent / second).write_bytes(LFS)
    with pytest.raises(UserError, match=rf"{second}: is a git-LFS pointer"):
        check_parent_files(location)
    (parent / second).write_bytes((parent / first).read_bytes())
    with pytest.raises(UserError, match=rf"{second}: does not hold .*, but the index says so"):
        check_parent_files(location)
    (parent / second).write_bytes(kept)
    for content in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../b"}}'):
        (parent / INDEX).write_text(content)
        with pytest.raises(UserError, match=rf"{INDEX}: has no valid weight_map"):
            check_parent_files(location)
    (parent / INDEX).unlink()
    with pytest.raises(UserError, match=rf"has {first} but no {INDEX}"):
        check_parent_files(location)
    (parent / INDEX).write_text(index)
    check_parent_files(location)


def test_a_file_with_unused_tensors_only_has_to_be_whole_too(tmp_path):
    save_random_parent(tmp_path, 1, random_config(1))
    split_in_shards(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    save_file({"mtp.a": torch.zeros(3, dtype=torch.int8)}, tmp_path / "mtp.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {"mtp.a": "mtp.safetensors"}}))
    check_parent_files(tmp_path)
    cut(tmp_path / "mtp.safetensors", -1)
    with pytest.raises(UserError, match=r"mtp\.safetensors: is truncated"):
        check_parent_files(tmp_path)


def test_only_headers_are_read(parent, monkeypatch):
    """At a URL of a larger model, too: the requests together are far below its bytes."""
    config = llama(tied=False)
    config.intermediate_size = 200_000
    save_random_parent(parent, 0, config)
    opened, original, num_bytes = [], filesystem.RemoteFile.readinto, []

    def readinto(self, buffer):
        num_bytes.append(original(self, buffer))
        return num_bytes[-1]

    monkeypatch.setattr(filesystem.RemoteFile, "readinto", readinto)
    monkeypatch.setattr("elastic_core.io.tensor_files.safe_open", lambda *a: opened.append(a))
    check_parent_files(f"file://{parent}")
    assert not opened and 0 < sum(num_bytes) < 2**18 < (parent / SINGLE).stat().st_size / 50


@pytest.mark.parametrize("sharded", [thorough(False), True])
def test_the_command_for_pytorch_files_works(tmp_path, sharded):
    reference = save_random_parent(tmp_path / "a parent", 3, llama(tied=False))
    directory = tmp_path / "a parent"
    tensors = load_file(directory / SINGLE)
    names = sorted(tensors)
    files = {"pytorch_model.bin": names}
    if sharded:
        files = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
        weight_map = {name: file for file, part in files.items() for name in part}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for file, part in files.items():
        torch.save({name: tensors[name] for name in part}, directory / file)
    (directory / SINGLE).unlink()
    with pytest.raises(
        UserError, match=r"only as pytorch_model.*\.bin; expected safetensors files; convert it:"
    ) as error:
        check_parent_files(directory)
    with pytest.raises(UserError, match=r"convert a local copy of it: python .*'DIRECTORY'"):
        check_parent_files(f"file://{directory}")
    command = str(error.value).partition("convert it: ")[2]
    assert command == convert_command(directory)
    program, *arguments = shlex.split(command)
    assert program == "python"
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    check_parent_files(directory)
    ids = random_ids(reference.config, 0)
    with torch.no_grad():
        assert relative_error(ElasticModel.from_pretrained(directory)(ids), reference(ids).logits) < 1e-5


def transformers_logits(directory, ids):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory)(ids).logits


def test_a_head_equal_to_tied_embeddings_is_read_as_transformers_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "BLOCK_BYTES", 100)
    save_random_parent(tmp_path / "a", 0, llama(tied=True))
    tensors, ids = load_file(tmp_path / "a" / SINGLE), random_ids(llama(True), 0)
    save_file(tensors | {HEAD: tensors[EMBEDDINGS].clone()}, tmp_path / "a" / SINGLE, {"format": "pt"})
    check_parent_files(tmp_path / "a")
    model, reader = ElasticModel.from_pretrained(tmp_path / "a"), hf.TensorReader(tmp_path / "a")
    assert reader.has_tied_head
    with torch.no_grad():
        assert relative_error(model(ids), transformers_logits(tmp_path / "a", ids)) < 1e-5
    extract(tmp_path / "a", Submodel(), tmp_path / "b")
    assert HEAD not in load_file(tmp_path / "b" / SINGLE)
    assert torch.equal(transformers_logits(tmp_path / "b", ids), transformers_logits(tmp_path / "a", ids))


def test_another_head_beside_tied_embeddings_is_refused(tmp_path):
    """transformers keeps both, against the configuration; with tie_word_embeddings false, both do the same."""
    save_random_parent(tmp_path, 0, llama(tied=True))
    tensors, ids = load_file(tmp_path / SINGLE), random_ids(llama(True), 0)
    head = tensors[EMBEDDINGS].clone()
    head[-1, -1] += 0.5  # the last of all values
    save_file(tensors | {HEAD: head}, tmp_path / SINGLE, {"format": "pt"})
    expected = transformers_logits(tmp_path, ids)
    for load in (check_parent_files, ElasticModel.from_pretrained, lambda d: extract(d, Submodel(), tmp_path / "out")):
        with pytest.raises(UserError, match=r"lm_head\.weight differs .*set tie_word_embeddings to false"):
            load(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": False}))
    with torch.no_grad():
        assert relative_error(ElasticModel.from_pretrained(tmp_path)(ids), expected) < 1e-5


def test_no_head_and_no_ties_is_refused(tmp_path):
    """transformers draws a random head, another one at every load."""
    save_random_parent(tmp_path, 0, llama(tied=True))
    values, ids = json.loads((tmp_path / "config.json").read_text()), random_ids(llama(True), 0)
    (tmp_path / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": False}))
    assert not torch.equal(transformers_logits(tmp_path, ids), transformers_logits(tmp_path, ids))
    for check in (check_parent_files, ElasticModel.from_pretrained):
        with pytest.raises(UserError, match=r"no lm_head\.weight, .*set tie_word_embeddings to true"):
            check(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_weights_that_are_not_finite_are_counted(parent, monkeypatch, value):
    """1e39 is finite as float64, and infinite as float32."""
    monkeypatch.setattr("elastic_core.model.parent_files.BLOCK_VALUES", 50)
    tensors = {name: tensor.double() for name, tensor in load_file(parent / SINGLE).items()}
    for name, count in ((EMBEDDINGS, 3), ("model.norm.weight", 1), (HEAD, 2), ("model.layers.1.mlp.up_proj.weight", 1)):
        tensors[name].view(-1)[-count:] = value
    save_file(tensors, parent / SINGLE)
    reader, names = hf.TensorReader(parent), list(architectures.shapes(hf.read_config(parent)))
    first = f"{EMBEDDINGS} (3 values), model.layers.1.mlp.up_proj.weight (1 values), model.norm.weight (1 values) and 1"
    with pytest.raises(UserError, match=re.escape(f"4 of {len(names)} tensors hold NaN or infinite values: {first}")):
        check_weights(reader, names)
    shutil.rmtree(parent)
    save_random_parent(parent, 0, llama(tied=False))
    check_weights(hf.TensorReader(parent), names)


def test_constant_and_infinite_logits_are_refused():
    model, ids = randomise(ElasticModel(llama(tied=False)), 0), torch.arange(20)[None]
    check_logits(model, ids, "here")
    with torch.no_grad():
        model.lm_head.weight.fill_(1.0)
        with pytest.raises(UserError, match=r"here: the model's logits are the same for every token; it has"):
            check_logits(model, ids, "here")
        randomise(model, 0).model.embed_tokens.weight.fill_(1.0)
        with pytest.raises(UserError, match=r"here: .* the same for every text"):
            check_logits(model, ids, "here")
        randomise(model, 0).model.norm.weight.fill_(3e38)
        with pytest.raises(UserError, match=r"here: .*NaN or infinite logits"):
            check_logits(model, ids, "here")
        for parameter in model.parameters():
            parameter.zero_()
        with pytest.raises(UserError, match=r"every token; \d+ tensors are all zero, such as model\.embed_tokens"):
            check_logits(model, ids, "here")
