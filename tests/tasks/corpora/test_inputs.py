"""Files and data sets as inputs: groups, held-out files, overlaps, special tokens in texts."""

import json
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import datasets
import pytest
from huggingface_hub.utils import httpx

from elastic_core.data.loader import TokenData
from elastic_core.errors import UserError
from elastic_core.io.fingerprints import DigestCache
from elastic_core.io.storage import StorageUnavailable
from tasks import fingerprint
from tasks.corpora import hub_datasets
from tasks.corpora.conversations.source import Conversations
from tasks.corpora.encoding import CONTROL_STRINGS
from tasks.corpora.hub_datasets import HubDataset
from tasks.corpora.inputs import OVERLAPS
from tasks.corpora.text_files import without_nulls
from tasks.corpora.text_sources import Files
from tasks.fingerprint import corpora
from tasks.prepare_data import prepare
from tests.support.models.chat_templates import CHATML, chat_tokenizer
from tests.support.pipeline.corpora import configure, texts, write_jsonl

RENDERED = [
    "<|im_start|>user\nIs 91 prime?<|im_end|>\n<|im_start|>assistant\nNo: 7 x 13.<|im_end|>\n",
    "<|im_start|>user\nIs 97 prime?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n",
]


def test_rows_of_a_group_are_in_one_split(tmp_path):
    rows = [{"text": f"text {i}", "meta": {"problem": i % 40}} for i in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    source = Files(path=str(tmp_path / "a.jsonl"), held_out=0.3, group_field="meta.problem")
    sides = {}
    for split, text in source.texts(0):
        sides.setdefault(int(text.split()[1]) % 40, set()).add(split)
    assert len(sides) == 40 and all(len(found) == 1 for found in sides.values())
    assert {"train"} in sides.values() and {"held_out"} in sides.values()
    (tmp_path / "a.txt").write_text("plain")
    with pytest.raises(UserError, match=r"a\.txt, line 1: has no fields, so group_field 'meta\.problem' cannot"):
        list(Files(path=str(tmp_path / "a.txt"), group_field="meta.problem").texts(0))


def test_held_out_files_and_their_overlaps(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(30))
    write_jsonl(tmp_path / "own.jsonl", [*texts(2), "another", None])
    source = Files(path=str(tmp_path / "a.jsonl"), held_out_path=str(tmp_path / "own.jsonl"))
    skipped, notes = Counter(), Counter()
    found = list(source.texts(0, skipped, notes))
    assert [text for split, text in found if split == "held_out"] == [*texts(2), "another"]
    assert [text for split, text in found if split == "train"] == texts(30)
    assert notes == {OVERLAPS: 2} and skipped == {"null": 1}


def test_special_tokens_in_texts(tmp_path, capsys):
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.save_pretrained(tmp_path / "parent")
    write_jsonl(tmp_path / "a.jsonl", RENDERED * 60 + texts(80))
    write_jsonl(tmp_path / "own.jsonl", ["held out"])
    section = {"kind": "files", "path": str(tmp_path / "a.jsonl"), "held_out_path": str(tmp_path / "own.jsonl")}
    for mode, count in (("text", 0), ("parse", 2)):
        config = configure({"mine": section | {"special_tokens": mode}})
        manifest = prepare(config, tmp_path / "parent", tmp_path / mode, seed=0)
        data = TokenData(tmp_path / mode)
        tokens, offsets = data.tokens("mine", "train"), data.offsets("mine", "train")
        first = tokens[offsets[0] : offsets[1]].tolist()
        assert tokenizer.decode(first) == RENDERED[0] + "<|im_end|>"  # eos ends a document
        assert first.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == count
        said = capsys.readouterr().out
        assert manifest.sources["mine"].notes == ({CONTROL_STRINGS: 120} if mode == "text" else {})
        assert ("set special_tokens: parse, or give the messages" in said) == (mode == "text")


def test_a_text_that_is_complete_gets_no_second_end(tmp_path):
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.save_pretrained(tmp_path / "parent")
    write_jsonl(tmp_path / "a.jsonl", ["a<|im_end|>", *texts(100)])
    section = {"kind": "files", "path": str(tmp_path / "a.jsonl"), "held_out": 0.2, "special_tokens": "parse"}
    prepare(configure({"mine": section}), tmp_path / "parent", tmp_path / "data", seed=0)
    data = TokenData(tmp_path / "data")
    shortest = min(
        (data.tokens("mine", s)[a:b].tolist() for s in ("train", "held_out") for a, b in spans(data, s)), key=len
    )
    assert tokenizer.decode(shortest) == "a<|im_end|>"


def spans(data, split):
    return pairwise(data.offsets("mine", split))


def test_local_data_sets(tmp_path):
    rows = [{"text": "one", "n": 1}, {"text": "two", "n": None}]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(tmp_path / "splits")
    for name in ("plain", "saved", "splits"):
        found = list(HubDataset(str(tmp_path / name)).rows())
        assert [row for _, row in found] == rows and found[1][0].endswith(", row 2")
    assert [text for _, text in Files(dataset=str(tmp_path / "plain")).texts(0)] == ["one", "two"]
    with pytest.raises(UserError, match=r"plain \(test\): cannot be read: Bad split: test"):
        list(HubDataset(str(tmp_path / "plain"), split="test").rows())
    with pytest.raises(UserError, match=r"plain \(other, train\): cannot be read: .*'other' not found"):
        list(HubDataset(str(tmp_path / "plain"), config="other").rows())


def test_a_data_set_of_the_hub_without_the_hub(tmp_path, monkeypatch):
    """From the hub's cache, and else an error that says what to do. Offline, no server is asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "none")
    with pytest.raises(
        UserError, match=r"me/chats \(train\): cannot be reached .*is in no local cache .*local directory"
    ) as caught:
        list(HubDataset("me/chats").rows())
    assert type(caught.value) is UserError  # nobody asked the hub, so a later start would not help
    cached, commit = tmp_path / "datasets--me--chats", "a" * 40
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots" / commit / "train.jsonl").write_text('{"text": "from the cache"}\n')
    for revision in (None, commit):
        assert [row for _, row in HubDataset("me/chats", revision=revision).rows()] == [{"text": "from the cache"}]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionError("Couldn't reach 'me/chats' on the Hub (ConnectTimeout)"), StorageUnavailable),
        (TimeoutError(), StorageUnavailable),
        (httpx.ReadTimeout("slow"), StorageUnavailable),
        (httpx.ConnectError("refused"), StorageUnavailable),
        (httpx.TooManyRedirects("again"), UserError),
        (datasets.exceptions.DatasetNotFoundError("no such data set"), UserError),
        (RuntimeError("Dataset scripts are no longer supported, but found chats.py"), UserError),
    ],
)
def test_a_hub_that_does_not_answer_may_do_so_later(tmp_path, monkeypatch, error, kind):
    def load(*_, **__):
        raise error

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"^dataset me/chats \(train\): cannot be re\w+") as caught:
        list(HubDataset("me/chats").rows())
    assert type(caught.value) is kind


def test_a_directory_with_a_script_is_refused(tmp_path):
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "chats.py").write_text("")
    with pytest.raises(UserError, match=r"chats \(train\): cannot be read: Dataset scripts are no longer supported"):
        list(HubDataset(str(tmp_path / "chats")).rows())


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "data set"])
def test_nulls_in_named_fields_are_kept_in_tables_too(tmp_path, kind):
    """A row without a group is on its own, and a row without text is skipped."""
    rows = [{"meta": {"text": f"text {i}", "id": i % 3, "more": None}} for i in range(6)]
    rows[1]["meta"]["id"] = rows[2]["meta"]["text"] = None
    table = datasets.Dataset.from_list(rows)
    if kind == "data set":
        table.save_to_disk(tmp_path / "rows")
        source = {"dataset": str(tmp_path / "rows")}
    else:
        path = tmp_path / f"rows.{kind}"
        (table.to_json if kind == "jsonl" else table.to_parquet)(path)
        source = {"path": str(path)}
    skipped = Counter()
    found = list(Files(**source, text_field="meta.text", group_field="meta.id").texts(0, skipped))
    assert [text for _, text in found] == [f"text {i}" for i in (0, 1, 3, 4, 5)] and skipped == {"null": 1}


def test_nulls_in_messages_of_tables_are_left_out():
    """Every object of a column has the fields of all; in the row, a null is what it was."""
    row = {"messages": [{"role": "user", "content": "a", "tool_calls": None}], "tools": None, "a": {"b": {"c": None}}}
    assert without_nulls(row, ()) == {"messages": [{"role": "user", "content": "a"}], "tools": None, "a": {"b": {}}}
    assert without_nulls(row, ("a.b.c", "messages"))["a"] == row["a"]


@pytest.mark.parametrize("share", [0.02, 0.001])
def test_reading_ends_with_the_training_text(tmp_path, share):
    """However small the share of held-out text is, but not before there is some."""
    write_jsonl(tmp_path / "a.jsonl", [f"text number {i}" for i in range(20_000)])
    source, read = Files(path=str(tmp_path / "a.jsonl"), held_out=share, max_characters=20_000), []
    rows = source.inputs()[0].rows

    def counted(field):
        for row in rows(field):
            read.append(row)
            yield row

    object.__setattr__(source, "inputs", lambda: [SimpleNamespace(rows=counted)])
    splits = [split for split, _ in source.texts(0)]
    assert "held_out" in splits and splits.count("train") < len(read) < splits.count("train") + 2 / share


@pytest.mark.parametrize("kind", [Files, Conversations])
def test_expected_characters_are_within_the_limit(tmp_path, kind):
    (tmp_path / "a.jsonl").write_text("x" * 500)
    path = str(tmp_path / "a.jsonl")
    assert kind(path=path).expected_characters() == 500
    assert kind(path=path, max_characters=100).expected_characters() == 105
    assert kind(dataset="me/chats").expected_characters() is None
    assert kind(dataset="me/chats", max_characters=100).expected_characters() == 105


def test_a_branch_of_a_hub_data_set_has_the_commit_in_its_fingerprint(tmp_path, monkeypatch):
    """That of the last time, if the hub does not answer. A commit needs no answer."""
    monkeypatch.chdir(tmp_path)
    answers, asked = iter([None, "a" * 40, None, "b" * 40, None]), []
    monkeypatch.setattr(hub_datasets, "commit_of", lambda *names: asked.append(names) or next(answers))

    def take(revision):
        section = configure({"hub": {"kind": "conversations", "dataset": "me/chats", "revision": revision}})
        settings = SimpleNamespace(prepare_data=section)
        fingerprint.write(fingerprint.OUT / "corpora.json", lambda: corpora(settings, DigestCache("digests.json")))
        return json.loads((fingerprint.OUT / "corpora.json").read_text())["hub"]["dataset"]

    first = {"name": "me/chats", "revision": None}
    assert [take(None) for _ in range(4)] == [first, *(first | {"commit": c * 40} for c in "aab")]
    assert take("v1") == {"name": "me/chats", "revision": "v1"}  # the known commit is that of another branch
    assert take("c" * 40) == {"name": "me/chats", "revision": "c" * 40}
    assert asked == [("me/chats", None)] * 4 + [("me/chats", "v1")]


def test_the_hub_is_not_waited_for_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub_datasets.commit_of("me/chats", None) is hub_datasets.commit_of("no name", "main") is None


def test_fingerprints_see_every_input(tmp_path, monkeypatch):
    """Held-out files, templates and data sets: a change of any of them changes the fingerprint of the source."""

    class Settings:
        prepare_data = None

    names = {"path": "a.jsonl", "held_out_path": "b.jsonl", "chat_template": "c.jinja"}
    for name in names.values():
        (tmp_path / name).write_text("x")
    (tmp_path / "local").mkdir()
    section = {"kind": "conversations"} | {field: str(tmp_path / name) for field, name in names.items()}
    hub = {"kind": "conversations", "dataset": "me/chats", "revision": "v1"}
    local = {"kind": "files", "dataset": str(tmp_path / "local")}
    Settings.prepare_data = configure({"mine": section, "hub": hub, "local": local, "prose": {"kind": "bible"}})
    monkeypatch.chdir(tmp_path)
    first = corpora(Settings, DigestCache(tmp_path / "digests.json"))
    assert first["hub"] == {"dataset": {"name": "me/chats", "revision": "v1"}} and set(first) == {
        "mine",
        "hub",
        "local",
    }
    for field, name in names.items():
        (tmp_path / name).write_text("y" + field)
        changed = corpora(Settings, DigestCache(tmp_path / "digests.json"))
        assert {key for key in first["mine"] if first["mine"][key] != changed["mine"][key]} == {field}
        first = changed
    (tmp_path / "local" / "train.jsonl").write_text("{}")
    assert corpora(Settings, DigestCache(tmp_path / "digests.json"))["local"] != first["local"]
