"""Corpora, parent and exports on a real S3 server: as from disk, streamed, and refused before any work."""

import copy
import json
import logging
import os
import re
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_core.config import ConfigError
from elastic_core.data.loader import TokenData
from elastic_core.export import elastic_checkpoint
from elastic_core.io import storage
from elastic_core.io.directory_transfer import download_directory, local_files, upload_directory
from elastic_core.io.tokenizer_files import copy_tokenizer, is_tokenizer_file
from elastic_core.model import hf
from elastic_core.model.submodel import Submodel, full_submodel
from elastic_core.search.selection import Member
from tasks import extract, parent
from tasks.corpora.text_sources import Files
from tasks.prepare_data import prepare
from tasks.settings import remote_checks
from tasks.settings.load import load
from tasks.settings.parts.parent import Parent
from tests.support.committed_params import COMMITTED
from tests.support.models.parents import random_elastic, save_random_parent
from tests.support.models.routed_family import CONFIG
from tests.support.pipeline.corpora import NO_TASKS, configure, texts, write_jsonl
from tests.support.pipeline.stages import check_parameters, run_stage
from tests.support.places import files_below
from tests.support.s3_server import SECRET

MIB = 1 << 20


@pytest.fixture
def corpus(tmp_path):
    """One file of every kind, each with more than one block of text."""
    some = texts(6, length=15000)
    documents = [f"{i}, {some[i % len(some)]}" for i in range(600)]
    directory = tmp_path / "corpus"
    directory.mkdir()
    write_jsonl(directory / "a.jsonl", documents)
    (directory / "b.txt").write_text("".join(text + "\n" for text in documents), encoding="utf-8")
    columns = {"text": documents, "other": [str(i) * 20000 for i in range(len(documents))]}
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, directory / "c.parquet", row_group_size=50, compression="none")
    for path in directory.iterdir():
        assert path.stat().st_size > 6 * MIB
    return directory


def test_a_corpus_from_s3_is_that_from_disk_and_is_streamed(s3, corpus, calls):
    for path in sorted(corpus.iterdir()):
        storage.upload(path, storage.join(s3.place, path.name))
    for path in sorted(corpus.iterdir()):
        local, remote = Files(path=str(path)), Files(path=storage.join(s3.place, "*" + path.suffix))
        assert remote.expected_characters() == local.expected_characters() == path.stat().st_size
        calls.clear()
        assert list(islice(remote.texts(0), 10)) == list(islice(local.texts(0), 10))
        assert 0 < requested(calls, path.stat().st_size) <= 5 * MIB < path.stat().st_size / 1.5
        calls.clear()
        assert list(remote.texts(0)) == list(local.texts(0))
        share = 0.5 if path.suffix == ".parquet" else 1.0  # of a table only the text's column
        assert requested(calls, path.stat().st_size) <= share * path.stat().st_size
        if path.suffix != ".parquet":
            blocks = -(-path.stat().st_size // storage.BLOCK_BYTES)
            assert [method for method, _ in calls].count("get_object") == blocks


def requested(calls, size):
    """Bytes of a file of `size` that the client asked for."""
    total = 0
    for method, arguments in calls:
        if method == "get_object":
            first, last = arguments["Range"].removeprefix("bytes=").split("-")
            total += min(int(last), size - 1) - int(first) + 1
    return total


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"s3://test/\w+/a\.jsonl, line 2: not valid JSON"),
        ("a.txt", b"fine\nnot \xe4 fine\n", r"s3://test/\w+/a\.txt, line 2: not valid UTF-8"),
        ("a.parquet", b"PAR1", r"s3://test/\w+/a\.parquet: not a readable parquet file"),
        ("a.pdf", b"", r"s3://test/\w+/a\.pdf: cannot read '\.pdf' files; allowed: \.txt, \.jsonl, \.json \("),
        (None, b"", r"path 's3://test/\w+/\*': no file matches it"),
    ],
)
def test_a_bad_file_is_named_with_its_line(s3, name, content, message):
    if name:
        storage.write_bytes(storage.join(s3.place, name), content)
    with pytest.raises(ValueError, match=message):
        list(Files(path=storage.join(s3.place, "*")).texts(0))


@pytest.fixture(scope="module")
def parent_directory(tmp_path_factory):
    """A parent in several shards, with a tokenizer, as people have them on disk."""
    root = tmp_path_factory.mktemp("parent")
    write_jsonl(root / "a.jsonl", texts(300))
    section = {"kind": "files", "path": str(root / "a.jsonl"), "held_out": 0.1}
    prepare(configure({"mine": section}), None, root / "data", seed=0)
    config = copy.deepcopy(CONFIG)
    config.vocab_size = 300
    directory = root / "model"
    save_random_parent(root / "whole", 0, config)
    model = AutoModelForCausalLM.from_pretrained(root / "whole")
    model.save_pretrained(directory, max_shard_size="20KB")
    copy_tokenizer(root / "data" / "tokenizer", directory)
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def write_params(directory, corpus, **changes):
    """A params.yaml of the committed structure, for the small parent above."""
    values = copy.deepcopy(COMMITTED)
    values["prepare_data"] = {"vocab_size": 300, "evaluation": NO_TASKS, "sources": {"mine": corpus}}
    for name in ("rank", "train_short", "train_extended"):
        values[name]["mixture"] = {"mine": 1.0}
    values["evaluate"] |= {"held_out": ["mine"], "tasks": []}
    values["choices"] = {"hidden_size": list(range(16, 5, -1)), "intermediate_size": list(range(24, 1, -1))}
    values["choices"] |= {"mamba_num_heads": [4, 2], "mamba_head_dim": [6, 5, 4, 3, 2], "num_attention_heads": [4, 2]}
    values["budgets"] = {"full": 1.0, "small": 0.6}
    for name in ("train_short", "train_extended"):
        values[name]["budget_shares"] = {}
    for section, entries in changes.items():
        values[section] = entries
    (directory / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return values


@pytest.fixture
def project(s3, tmp_path, monkeypatch, parent_directory):
    """A working directory whose corpus, parent and exports are all on the server."""
    monkeypatch.chdir(tmp_path)
    upload_directory(parent_directory, storage.join(s3.place, "models", "parent"))
    storage.write_bytes(storage.join(s3.place, "models", "parent", "pytorch_model.bin"), b"not needed")
    write_jsonl(tmp_path / "a.jsonl", texts(300))
    storage.upload(tmp_path / "a.jsonl", storage.join(s3.place, "corpus", "a.jsonl"))
    corpus = {"kind": "files", "path": storage.join(s3.place, "corpus", "*.jsonl"), "held_out": 0.1}
    url = storage.join(s3.place, "models", "parent")
    exports = {"destination": storage.join(s3.place, "exports")}

    def write(**changes):
        write_params(tmp_path, changes.pop("corpus", corpus), **{"parent": {"path": url}, "extract": exports} | changes)

    write()
    return write


def test_a_parent_from_s3_is_that_from_disk(s3, project, tmp_path, parent_directory, monkeypatch, calls):
    settings = load()
    remote_checks.check(settings)
    assert not any(".safetensors" in str(arguments) for method, arguments in calls if method == "get_object")
    with local_files(settings.parent.path, is_tokenizer_file) as local:
        assert sorted(files_below(local)) == sorted(filter(is_tokenizer_file, files_below(parent_directory)))
    prepare(settings.prepare_data, settings.parent.path, "artifacts/data", settings.seed)
    data = TokenData("artifacts/data")
    parent.import_parent(settings.parent, data)
    monkeypatch.setattr(parent, "OUT", tmp_path / "from_disk")
    parent.import_parent(Parent(str(parent_directory)), data)
    assert files_below(tmp_path / "artifacts" / "parent") == files_below(tmp_path / "from_disk")
    assert not list((tmp_path / "checkpoints").iterdir())
    assert not any("pytorch_model.bin" in str(arguments) for method, arguments in calls if method == "get_object")
    asked = {arguments["Key"] for method, arguments in calls if method == "get_object"}
    assert {Path(key).name for key in asked} >= {path.name for path in parent_directory.glob("*.safetensors")}


def test_reading_params_asks_no_server_and_checking_them_does(s3, project, capsys):
    s3.kill()
    assert load().parent.path == storage.join(s3.place, "models", "parent")
    with pytest.raises(SystemExit) as caught:
        check_parameters()
    words = r"^error: params\.yaml: prepare_data\.sources\.mine\.path: s3://.*no answer"
    assert caught.value.code == os.EX_TEMPFAIL and re.search(words, capsys.readouterr().err)
    s3.restart()
    check_parameters()
    assert capsys.readouterr().out == "params.yaml is valid\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"parent": {"path": "s3://test/nowhere"}},
            r"parent\.path: got 's3://test/nowhere'; .*a config\.json, or null",
        ),
        ({"parent": {"path": "s3://no-such-bucket/a"}}, r"parent\.path: s3://no-such-bucket/a: .*no such bucket"),
        ({"extract": {"destination": "s3://no-such-bucket/a"}}, r"extract\.destination: s3://.*no such bucket"),
        ({"extract": {"destination": ""}}, r"extract\.destination: got ''; allowed: a URL such as s3://"),
        ({"corpus": {"kind": "files", "path": "s3://no-such-bucket/*.txt"}}, r"mine\.path: s3://.*no such bucket"),
        ({"budgets": {"full": 1.0, "small": 0.001}}, r"budgets\.small: got 0\.001 "),
        ({"choices": {"hidden_size": [12, 8]}}, r"choices\.hidden_size: got \[12, 8\]; .*own 16"),
    ],
)
def test_places_that_cannot_be_used_are_refused(project, changes, words):
    project(**changes)
    with pytest.raises(SystemExit, match=rf"^error: params\.yaml.*{words}"):
        check_parameters()


def test_a_parent_on_s3_of_another_kind_or_without_tokenizer(s3, project):
    url = storage.join(s3.place, "models", "parent")
    values = json.loads(storage.read_bytes(storage.join(url, "config.json")))
    storage.write_bytes(storage.join(url, "config.json"), json.dumps(values | {"model_type": "gpt2"}).encode())
    words = r"^error: params\.yaml: parent: s3://test/\w+/models/parent: model_type is 'gpt2'"
    for refuse in (check_parameters, lambda: run_stage("prepare_data")):
        with pytest.raises(SystemExit, match=words):
            refuse()
    storage.remove(storage.join(url, "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"^params\.yaml: parent\.path: .*a directory with its tokenizer too"):
        remote_checks.check(load(), "parent")


def test_wrong_credentials_are_refused_before_any_work_and_not_shown(project, monkeypatch, caplog):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET + "-not")
    caplog.set_level(logging.DEBUG)
    for section in ("prepare_data", "parent", "extract"):
        with pytest.raises(ConfigError, match="does not accept the credentials") as caught:
            remote_checks.check(load(), section)
        assert SECRET not in str(caught.value)
    assert SECRET not in caplog.text


def test_exports_are_copied_and_load(s3, project, tmp_path, parent_directory, monkeypatch, capsys, caplog):
    caplog.set_level(logging.DEBUG)
    config = hf.read_config(parent_directory)
    small = Submodel(hidden_size=12, kept_layers=(0, 1, 2)).resolve(config)
    members = {"full": Member(1.0, full_submodel(config)), "small": Member(0.6, small)}
    for i, source in enumerate(extract.SOURCES.values()):
        random_elastic(i, config).save_pretrained(source, tokenizer_from=parent_directory)
    elastic_checkpoint.write(extract.FAMILY, config, members, [small])
    extract.main("small")
    assert storage.list_names(storage.join(s3.place, "exports", "small")) == ["extended", "short", "zero_shot"]
    download_directory(storage.join(s3.place, "exports", "small", "extended"), tmp_path / "copy")
    assert files_below(tmp_path / "copy") == files_below(tmp_path / "artifacts" / "models" / "small" / "extended")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert model.config.hidden_size == 12 and len(model.model.layers) == 3
    ids = AutoTokenizer.from_pretrained(tmp_path / "copy")("the words", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()
    printed = capsys.readouterr()
    assert f"copied to {s3.place}/exports/small/extended" in printed.out
    assert SECRET not in printed.out + printed.err + caplog.text


def test_an_export_that_cannot_be_copied_is_refused_before_the_extraction(project):
    project(extract={"destination": "s3://no-such-bucket/exports"})
    with pytest.raises(SystemExit, match=r"^error: params\.yaml: extract\.destination: .*no such bucket"):
        run_stage("extract", "small")
    assert not Path("artifacts").exists()
