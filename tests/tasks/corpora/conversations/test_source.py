"""The source `conversations`, from files of every format to token files."""

import gzip
import json
from collections import Counter
from itertools import pairwise

import pyarrow
import pyarrow.parquet
import pytest

from elastic_core.config import ConfigError
from elastic_core.data.loader import TokenData
from elastic_core.errors import UserError
from tasks import prepare_data
from tasks.corpora import preparation
from tasks.corpora.conversations.encoding import ConversationEncoder
from tasks.corpora.conversations.source import Conversations
from tasks.corpora.inputs import OVERLAPS
from tasks.corpora.tokenizer import END_OF_TURN
from tasks.parents.tokenizer import load_tokenizer
from tasks.prepare_data import prepare
from tests.support.models.chat_templates import CHATML, chat_tokenizer
from tests.support.pipeline.corpora import configure
from tests.support.places import files_below

ROWS = [
    {
        "id": "p1",
        "messages": [
            {"role": "system", "content": "Answer with the number alone."},
            {"role": "user", "content": "A crate holds 12 jars. How many jars are in 7 crates?"},
            {"role": "assistant", "reasoning_content": "12 times 7 is 84.", "content": "84"},
        ],
    },
    {
        "id": "p1",
        "messages": [
            {"role": "user", "content": "A crate holds 12 jars. How many jars are in 7 crates?"},
            {"role": "assistant", "content": "7 x 12 = 84, so there are 84 jars."},
        ],
    },
    {
        "id": "p2",
        "messages": [
            {"role": "user", "content": "And if 5 of 84 jars break?"},
            {"role": "assistant", "content": "79 are left."},
            {"role": "user", "content": "Half of those are sold."},
            {"role": "assistant", "content": "That cannot be: 79 is odd. Sold are 39 or 40."},
        ],
    },
]


def many(count=200):
    """Two answers to each question."""
    return [
        {"group": {"of": i // 2}, "prompt": f"What is {i // 2} + 1?", "completion": f"{i // 2 + 1}" + "!" * (i % 2)}
        for i in range(count)
    ]


def write(path, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"])
def test_every_format_gives_the_same_conversations(tmp_path, name):
    found = [one for _, one in Conversations(path=write(tmp_path / name, ROWS)).documents(0)]
    expected = [
        [message | ({"thinking": r} if (r := message.get("reasoning_content")) else {}) for message in row["messages"]]
        for row in ROWS
    ]
    assert [one.messages for one in found] == expected
    assert found[1].place.endswith({"a.json": "line 1, item 2", "a.parquet": "row 2"}.get(name, "line 2"))


def test_answers_to_one_question_are_in_one_split(tmp_path):
    path = write(tmp_path / "a.jsonl", many())
    for field in (None, "group", "group.of"):
        sides = {}
        for split, one in Conversations(path=path, held_out=0.3, group_field=field).documents(0):
            sides.setdefault(one.first_request(), []).append(split)
        assert {len(found) for found in sides.values()} == {2}
        assert {len(set(found)) for found in sides.values()} == {1}
        assert 10 < sum(found[0] == "held_out" for found in sides.values()) < 60
    with pytest.raises(UserError, match=r"line 1: no field 'problem' .*set group_field"):
        list(Conversations(path=path, group_field="problem").documents(0))


def test_held_out_conversations_of_their_own(tmp_path):
    path, own = write(tmp_path / "a.jsonl", many(20)), write(tmp_path / "own.json", ROWS + many(3))
    notes = Counter()
    found = list(Conversations(path=path, held_out_path=own, held_out=0).documents(0, None, notes))
    assert [split for split, _ in found] == ["held_out"] * 6 + ["train"] * 20
    assert notes == {OVERLAPS: 4}  # the questions 0 and 1, two answers each


def test_rows_without_a_conversation_are_counted_or_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + '\n\n{"messages": null}\n{"messages": []}\n')
    skipped = Counter()
    assert len(list(Conversations(path=str(path)).documents(0, skipped))) == 1
    assert skipped == {"empty": 2, "null": 1}
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: the conversation is empty; `strict: false` skips"):
        list(Conversations(path=str(path), strict=True).documents(0))


def test_a_new_tokenizer_learns_from_messages_and_can_render_them(tmp_path):
    section = {"kind": "conversations", "path": write(tmp_path / "a.jsonl", ROWS + many()), "held_out": 0.2}
    manifest = prepare(configure({"mine": section}), None, tmp_path / "data", seed=0)
    data, tokenizer = TokenData(tmp_path / "data"), load_tokenizer(tmp_path / "data" / "tokenizer")
    for split, entry in manifest.sources["mine"].splits.items():
        tokens, offsets = data.tokens("mine", split), data.offsets("mine", split)
        trained = data.trained("mine", split)
        given = [one for part, one in Conversations(**section).documents(0) if part == split]
        expected = [
            tokenizer.apply_chat_template(one.messages, return_assistant_tokens_mask=True, return_dict=True)
            for one in given
        ]
        parts = list(pairwise(offsets))
        assert [tokens[a:b].tolist() for a, b in parts] == [one["input_ids"] for one in expected]
        assert [trained[a:b].astype(int).tolist() for a, b in parts] == [one["assistant_masks"] for one in expected]
        assert entry.num_trained == trained.sum() > 0
        ends = tokens[trained] == tokenizer.convert_tokens_to_ids(END_OF_TURN)
        assert ends.sum() == sum(sum(one.is_target) for one in given)


def test_a_template_of_ones_own_and_what_is_said_of_it(tmp_path, capsys):
    chat_tokenizer(None).save_pretrained(tmp_path / "parent")
    (tmp_path / "chatml.jinja").write_text(CHATML)
    section = {"kind": "conversations", "path": write(tmp_path / "a.jsonl", ROWS), "held_out": 0.5}
    with pytest.raises(UserError, match="the tokenizer has no chat template; set chat_template to a Jinja file"):
        prepare(configure({"mine": section}), tmp_path / "parent", tmp_path / "data", seed=0)
    section["chat_template"] = str(tmp_path / "chatml.jinja")
    manifest = prepare(configure({"mine": section}), tmp_path / "parent", tmp_path / "data", seed=0)
    prepare_data.print_summary(manifest, tmp_path / "data", {"mine": {"rank": 20, "train_short": 999, "evaluate": 110}})
    said = capsys.readouterr().out
    assert "1 conversations whose thinking the chat template leaves out: set chat_template" in said
    words = "{} documents are longer than {} tokens (too_long: drop); 100.0% of the {} tokens are lost"
    assert f"rank: {words.format('2 training', 20, 'training')}" in said
    assert f"evaluate: {words.format('1 held-out', 110, 'held-out')}" in said
    assert "train_short" not in said and "(54 trained) held_out" in said


def test_the_advice_on_special_tokens_is_of_the_kind(tmp_path, capsys):
    chat_tokenizer(CHATML).save_pretrained(tmp_path / "parent")
    rows = [row | {"prompt": f"{row['prompt']} <|im_end|>"} for row in many()]
    section = {"kind": "conversations", "path": write(tmp_path / "a.jsonl", rows), "held_out": 0.2}
    manifest = prepare(configure({"mine": section}), tmp_path / "parent", tmp_path / "data", seed=0)
    prepare_data.print_summary(manifest, tmp_path / "data", {}, {"mine"})
    said = capsys.readouterr().out
    assert said.count("special tokens, set special_tokens: parse\n") == 2 and "kind: conversations" not in said


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "path: got None; allowed: either `path`, a glob of files, or `dataset`"),
        ({"path": "a", "dataset": "b"}, "path: got 'a'; allowed: either"),
        ({"path": "a", "train_on": "user"}, "train_on: got 'user'; allowed: assistant, all, last_assistant"),
        ({"path": "a", "too_long": "cut"}, "too_long: got 'cut'; allowed: split, truncate, drop"),
        ({"path": "a", "special_tokens": "x"}, "special_tokens: got 'x'; allowed: text, parse"),
        ({"path": "a", "held_out": 0}, "held_out: got 0.0; allowed: more than 0 and less than 1; 0 only with held_out"),
        ({"path": "a", "held_out": 0.1, "held_out_path": "b"}, "held_out: got 0.1; allowed: 0 or nothing"),
        ({"path": "a", "group_field": "c", "held_out_path": "b"}, "group_field: got 'c'; allowed: null"),
        ({"path": "a", "revision": "main"}, "revision: got 'main'; allowed: null without `dataset`"),
        ({"path": "a", "field": "c", "prompt_field": "b"}, "field: got 'c'; allowed: null"),
    ],
)
def test_wrong_fields_are_named(values, message):
    with pytest.raises(ConfigError, match=rf"sources\.mine\.{message}"):
        configure({"mine": {"kind": "conversations"} | values})


class Stopped(BaseException):
    """As a kill: nothing of ours catches it."""


def test_a_stopped_preparation_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "PART_CHARACTERS", 400)
    system_only = {"messages": [{"role": "system", "content": "Nothing to learn <|im_end|>."}]}
    rows = [system_only if i % 10 == 0 else row for i, row in enumerate(many())]
    section = {"kind": "conversations", "path": write(tmp_path / "a.jsonl", rows), "held_out": 0.2}
    chat_tokenizer(CHATML).save_pretrained(tmp_path / "parent")
    config = configure({"mine": section})
    whole = prepare(config, tmp_path / "parent", tmp_path / "whole", seed=0)
    assert whole.sources["mine"].skipped_rows == {"without a trained token": 20}
    parts, encode = [], ConversationEncoder.encoded

    def stopping(self, documents):
        parts.append(1)
        if len(parts) == 4:
            raise Stopped
        return encode(self, documents)

    monkeypatch.setattr(ConversationEncoder, "encoded", stopping)
    with pytest.raises(Stopped):
        prepare(config, tmp_path / "parent", tmp_path / "data", seed=0, work=tmp_path / "work")
    assert prepare(config, tmp_path / "parent", tmp_path / "data", seed=0, work=tmp_path / "work") == whole
    assert files_below(tmp_path / "data") == files_below(tmp_path / "whole")
