"""Parents by their name on the hub: from a prepared cache, and from a server that answers as the hub does."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from elastic_core.data.loader import TokenData
from elastic_core.errors import UserError
from elastic_core.io.fingerprints import DigestCache
from elastic_core.io.storage import StorageUnavailable
from elastic_core.io.tokenizer_files import copy_tokenizer
from elastic_core.model import hf
from tasks import fingerprint, parent
from tasks.parents import hub
from tasks.parents.tokenizer import load_tokenizer
from tasks.prepare_data import prepare
from tasks.settings.parts.parent import Parent
from tasks.settings.paths import is_hub_name, locate_parent
from tests.support.committed_params import put, use_parent, write
from tests.support.hub_server import files_of, write_cache
from tests.support.models.parents import save_random_parent
from tests.support.pipeline.corpora import configure, texts, write_jsonl
from tests.support.pipeline.stages import check_parameters

NAME, FIRST, SECOND = "me/tiny", "a" * 40, "b" * 40
SHARD_BYTES = "20KB"  # of this parent: several shards
TINY = LlamaConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    intermediate_size=48, max_position_embeddings=64, eos_token_id=0, bos_token_id=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_jsonl(root / "a.jsonl", texts(300))
    prepare(configure({"mine": {"kind": "files", "path": str(root / "a.jsonl"), "held_out": 0.1}}), None, root / "d", 0)
    return TokenData(root / "d")


@pytest.fixture(scope="module")
def files(data, tmp_path_factory):
    """The files of a bfloat16 parent in several shards, with the tokenizer of the data and files that nobody needs."""
    directory = tmp_path_factory.mktemp("model")
    save_random_parent(directory, 0, TINY)
    model = hf.architectures.model_class(TINY).from_pretrained(directory, dtype=torch.bfloat16)
    shutil.rmtree(directory)
    model.save_pretrained(directory, max_shard_size=SHARD_BYTES)
    copy_tokenizer(data.directory / "tokenizer", directory)
    found = files_of(directory)
    assert sum(name.endswith(".safetensors") for name in found) > 2
    return found | {
        "README.md": b"---\nlicense: mit\n---\nabout",
        "Notice.txt": b"notice",
        "consolidated.safetensors": b"x" * 100,
        "pytorch_model.bin": b"x" * 100,
    }


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def needed(files):
    return {name for name in files if name not in ("consolidated.safetensors", "pytorch_model.bin")}


def weights(directory) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def without(files, *names):
    return {name: content for name, content in files.items() if name not in names}


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["Qwen/Qwen3-0.6B", "me/a_b.c@main", f"me/x@{FIRST}", "me/x@refs/pr/1"])
def test_names_on_the_hub_are_kept_as_they_are(path):
    assert is_hub_name(path) and locate_parent(path) == path


@pytest.mark.parametrize("path", ["qwen", "/models/x", "./models/x", "a/b/c", "package:x", "s3://a/b", "a/b@", "a/b c"])
def test_other_paths_are_no_names(path):
    assert not is_hub_name(path)


def test_a_directory_comes_first(tmp_path):
    assert is_hub_name("models/mine")
    Path("models/mine").mkdir(parents=True)
    assert not is_hub_name("models/mine") and locate_parent("models/mine") == str(tmp_path / "models/mine")


# --- import ----------------------------------------------------------------------------------------------------------


def test_a_parent_is_imported_from_the_cache_without_a_second_copy(data, files, hub_cache):
    """In the element type that its files have; the files are the cache's own."""
    directory = write_cache(hub_cache, NAME, files, FIRST)
    assert parent.import_parent(Parent(NAME), data) == f"{NAME}@{FIRST}"
    for file in needed(files):
        if file.endswith((".safetensors", ".index.json")):
            assert os.path.samefile(parent.OUT / file, directory / file)
    assert not (parent.OUT / "consolidated.safetensors").exists() and hf.read_config(parent.OUT).dtype == torch.bfloat16
    assert {tensor.dtype for tensor in weights(parent.OUT).values()} == {torch.bfloat16}
    assert not list(Path("checkpoints").glob("*download*"))


def test_a_parent_is_downloaded_once_with_only_what_is_needed(data, files, hub_cache, hub_server):
    hub_server.put(NAME, files, FIRST)
    parent.import_parent(Parent(NAME), data)
    assert {name for name in files if hub_server.ranges_of(name)} == needed(files)
    assert all(len(hub_server.ranges_of(name)) == 1 for name in needed(files))
    (directory,) = (hub_cache / "models--me--tiny" / "snapshots").iterdir()
    assert directory.name == FIRST and set(files_of(directory)) == needed(files)
    assert json.loads(Path("artifacts/parent/parent_card.json").read_text()) == {"base_model": NAME, "license": "mit"}


def test_a_download_that_was_stopped_goes_on(files, hub_server, monkeypatch):
    """After a broken connection with the bytes that were missing, after a stop with the files that were missing."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 64)
    hub_server.put(NAME, files, FIRST)
    first, shard = sorted(name for name in files if "-of-" in name)[:2]
    hub.fetch(NAME, first)
    hub_server.cut.add(shard)
    directory = hub.fetch_model(NAME)
    assert (directory / shard).read_bytes() == files[shard]
    assert hub_server.ranges_of(shard) == [None, f"bytes={len(files[shard]) // 2 // 64 * 64}-"]
    assert hub_server.ranges_of(first) == [None]
    hub.fetch_model(NAME)
    assert hub_server.ranges_of(first) == [None]


def test_without_an_answer_the_cache_is_used(data, files, hub_cache, hub_server, monkeypatch):
    hub_server.put(NAME, files, FIRST)
    hub.fetch_model(NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for path in (NAME, f"{NAME}@main", f"{NAME}@{FIRST}"):
        assert weights(hub.fetch_model(path)).keys() and load_tokenizer(path).eos_token_id == 0
    with pytest.raises(UserError, match=rf"^{NAME}@v2: .*may not be asked \(HF_HUB_OFFLINE\)"):
        hub.fetch_model(f"{NAME}@v2")


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_a_model_that_is_in_no_cache_is_an_error_that_says_what_to_do(hub_cache):
    with pytest.raises(UserError, match=r"^me/tiny: no such directory, .*HF_HUB_OFFLINE.*hf download") as error:
        hub.fetch_model(NAME)
    assert not isinstance(error.value, StorageUnavailable)


def test_half_a_model_in_the_cache_is_an_error_that_says_so(files, hub_cache):
    shard = next(name for name in files if "-of-" in name)
    write_cache(hub_cache, NAME, without(files, shard), FIRST)
    for use in (hub.check, hub.fetch_model):
        with pytest.raises(UserError, match=rf"^{NAME}: .*not all files .*lacks 1 of the .*{shard}"):
            use(NAME)


def test_what_the_hub_refuses_is_explained(files, hub_server):
    hub_server.put(NAME, files, FIRST)
    with pytest.raises(UserError, match=rf"^{NAME}@v9: {NAME} has no commit, tag or branch 'v9'"):
        hub.fetch(f"{NAME}@v9", "config.json")
    with pytest.raises(UserError, match=r"^me/none: no such directory, .*no model of this name, or a private one"):
        hub.fetch("me/none", "config.json")
    hub_server.gated.add(NAME)
    with pytest.raises(UserError, match=rf"^{NAME}: is gated: accept .*https://huggingface.co/{NAME}.*hf auth login"):
        hub.fetch(NAME, "config.json")


def test_a_hub_that_cannot_be_reached_may_answer_later(hub_server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageUnavailable, match=rf"^{NAME}: no such directory, and the hub cannot be reached"):
        hub.fetch(NAME, "config.json")


WITH_COMMAND = (
    r"weights only as pytorch_model\.bin; .* set parent.path to the new directory: python -c .*"
    r"from_pretrained\('me/tiny', revision='a{40}'\)"
)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda f: without(f, "tokenizer.json"), r"has no tokenizer \(tokenizer\.json or vocab\.json\)"),
        (lambda f: without(f, hub.INDEX, "pytorch_model.bin"), r"has model-00001-of-\d+\.safetensors but no model"),
        (lambda f: {n: c for n, c in f.items() if "safetensors" not in n}, WITH_COMMAND),
        (lambda f: f | {"tokenizer.json": b"{"}, r"tokenizer\.json: is not valid JSON"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_a_parent_is_refused_before_its_weights_are_downloaded(files, hub_server, edit, message):
    hub_server.put(NAME, edit(files), FIRST)
    with pytest.raises(UserError, match=rf"^{NAME}: .*{message}"):
        hub.check(NAME)
    assert not any(path.endswith(".safetensors") for _, path, _ in hub_server.asked)


def test_the_check_before_a_run_asks_the_hub_and_downloads_no_weights(values, files, hub_server, tmp_path, monkeypatch):
    hub_server.put(NAME, files, FIRST)
    use_parent(values, NAME)
    values["choices"] = {"intermediate_size": [48, 40, 32, 24, 16, 8], "hidden_size": [32], "depth": [2]}
    put("budgets", {"full": 1.0, "medium": 0.867, "small": 0.779})(values)
    put("extract", "heterogeneous", "pad")(values)
    write(values, tmp_path, monkeypatch)
    check_parameters()
    assert not any(path.endswith(".safetensors") for _, path, _ in hub_server.asked)
    hub_server.gated.add(NAME)
    hub_server.put(NAME, files, SECOND)
    with pytest.raises(SystemExit, match=rf"^error: params\.yaml: parent.*: {NAME}: is gated"):
        check_parameters()


# --- fingerprints ----------------------------------------------------------------------------------------------------


def seen(path=NAME):
    """The fingerprints of parent and tokenizer, as a run takes them."""
    settings, cache = SimpleNamespace(parent=Parent(path)), DigestCache("digests.json")
    for name, read in (("parent", fingerprint.parent), ("tokenizer", fingerprint.tokenizer)):
        fingerprint.write(fingerprint.OUT / f"{name}.json", lambda read=read: read(settings, cache))
    return [json.loads((fingerprint.OUT / f"{name}.json").read_text()) for name in ("parent", "tokenizer")]


def test_a_new_revision_is_seen_by_what_it_changes(files, hub_server):
    """A new text about the model changes nothing, weights change the parent, a template both. Nothing is downloaded."""
    hub_server.put(NAME, files, FIRST)
    first = seen()
    hub_server.put(NAME, files | {"README.md": b"more"}, SECOND)
    assert seen() == first
    shard = next(name for name in files if "-of-" in name)
    hub_server.put(NAME, files | {shard: files[shard][:-1] + b"!"}, "c" * 40)
    second = seen()
    assert second[0] != first[0] and second[1] == first[1]
    hub_server.put(NAME, files | {"chat_template.jinja": b"{{ messages }}"}, "d" * 40)
    third = seen()
    assert third[0] != first[0] and third[1] != first[1]
    assert len(hub_server.asked) == 8 and all(path.startswith("api/") for _, path, _ in hub_server.asked)


def test_a_commit_needs_no_answer(hub_server):
    assert seen(f"{NAME}@{FIRST}") == [{"name": NAME, "revision": FIRST}] * 2 and not hub_server.asked


def test_without_the_hub_the_fingerprint_is_that_of_the_cache_or_of_the_last_time(
    files, hub_cache, hub_server, monkeypatch
):
    """That of a complete cache is the same as the hub's, so that nothing runs again."""
    hub_server.put(NAME, without(files, "consolidated.safetensors"), FIRST)
    first = seen()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert seen() == first  # the last time
    shutil.rmtree(fingerprint.OUT)
    assert seen() == [{"name": NAME, "revision": None}] * 2
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.fetch_model(NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert seen() == first
