"""Text sources: held-out text is never trained on, bad files are named by their line, memory stays bounded."""

import signal
import subprocess
import sys
import tracemalloc
from itertools import islice, pairwise

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from elastic_core.config import ConfigError
from elastic_core.data.loader import TokenData, check_tokenizer
from tasks import prepare_data
from tasks.corpora import encoding
from tasks.corpora.preparation import Preparation
from tasks.corpora.text_sources import Bible, Files, Sympy
from tasks.corpora.tokenizer import END_OF_TEXT, train_tokenizer
from tasks.parents.tokenizer import load_tokenizer
from tasks.prepare_data import prepare
from tests.support.pipeline.corpora import configure, texts, write_jsonl


def by_split(pairs):
    found = {"train": [], "held_out": []}
    for split, text in pairs:
        found[split].append(text)
    return found


def test_the_bible_is_whole_in_order_and_ends_with_what_is_held_out():
    found = by_split(Bible().texts(seed=0))
    assert len(found["train"]) + len(found["held_out"]) == 1189  # chapters
    assert found["train"][0].startswith("In the beginning God created the heavens and the earth. Now the earth")
    assert found["held_out"][0].startswith("God, having in the past spoken to the fathers through the prophets")
    sizes = {split: sum(map(len, chapters)) for split, chapters in found.items()}
    assert 0.036 < sizes["held_out"] / sum(sizes.values()) < 0.038
    assert not any("  " in chapter for chapter in found["train"])


def test_sympy_holds_out_whole_subpackages_and_leaves_tests_out():
    found = by_split(Sympy().texts(seed=0))
    share = sum(map(len, found["held_out"])) / sum(sum(map(len, part)) for part in found.values())
    assert 0.03 < share < 0.05
    assert not set(found["train"]) & set(found["held_out"])
    assert any("class Triangle(Polygon)" in text for text in found["held_out"])
    assert not any("class Triangle(Polygon)" in text or "def test_" in text[:2000] for text in found["train"])


def test_max_characters_is_the_size_of_the_training_text():
    found = by_split(Sympy(max_characters=100_000).texts(seed=0))
    assert sum(map(len, found["train"])) == 100_000
    assert sum(map(len, found["held_out"])) == 5_000


def test_files_are_held_out_by_their_text(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(500))
    write_jsonl(tmp_path / "b.jsonl", texts(500))  # the same documents again
    pyarrow.parquet.write_table(pyarrow.table({"body": texts(400, seed=1), "n": range(400)}), tmp_path / "c.parquet")
    lines = by_split(Files(path=str(tmp_path / "*.jsonl"), held_out=0.1).texts(seed=0))
    assert not set(lines["train"]) & set(lines["held_out"])
    assert 0.05 < len(lines["held_out"]) / 1000 < 0.15
    rows = list(Files(path=str(tmp_path / "*.parquet"), text_field="body").texts(seed=0))
    assert [text for _, text in rows] == texts(400, seed=1)


def test_a_text_file_is_cut_at_line_ends_and_nothing_is_lost(tmp_path):
    text = "".join(f"Zeile {i} – größer als ß\n" for i in range(5000)) + "no line end"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    parts = [part for _, part in Files(path=str(tmp_path / "a.txt")).texts(seed=0)]
    assert "".join(parts) == text and len(parts) > 5
    assert all(part.endswith("\n") and 16_384 <= len(part) < 17_000 for part in parts[:-1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "x"}\n', r"a\.jsonl, line 3: no field 'text' \(fields: 'body'\)"),
        ("a.jsonl", b'{"text": "x"}\n\xef\xbb\xbf{}\n', r"line 2: not valid JSON \(byte-order mark at column 1\)"),
        ("a.jsonl", b'{"text": 7}\n', r"a\.jsonl, line 1: 'text' must be text, got int"),
        ("a.jsonl", b'{"text": null}\n', "the files hold no text"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl, line 1: expected an object, got list"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: not valid UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1: 'text' holds a lone surrogate"),
        ("a.jsonl", b"\n\n", "the files hold no text"),
        ("a.txt", b"fine\nnot \xe4 fine\n", r"a\.txt, line 2: not valid UTF-8"),
        ("a.txt", b"fine\ncut \xc3", r"a\.txt, line 2: not valid UTF-8"),
        ("a.txt", b" \n", "the files hold no text"),
        ("a.parquet", b"PAR1", r"a\.parquet: not a readable parquet file"),
        ("a.json", b" \n", r"a\.json: empty; a \.json file holds an array of objects, or an object per line"),
        ("a.json", b'{\n "text": "x"\n}', r"a\.json, line 1: not valid JSON .*; a \.json file holds an array"),
        ("a.pdf", b"", r"a\.pdf: cannot read '\.pdf' files; allowed: \.txt"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(Files(path=str(tmp_path / "*")).texts(seed=0))


def test_missing_columns_and_missing_files_are_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "y"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no field 'body' \(fields: 'text'\)"):
        list(Files(path=str(tmp_path / "a.parquet"), text_field="body").texts(seed=0))
    with pytest.raises(ValueError, match="no file matches"):
        list(Files(path=str(tmp_path / "*.jsonl")).texts(seed=0))


def test_the_tokenizer_keeps_any_text_and_splits_digits(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(300))
    prepare(configure({"mine": {"kind": "files", "path": str(tmp_path / "a.jsonl")}}), None, tmp_path / "data", seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data" / "tokenizer")
    for text in (" leading  and   inner spaces ", "Ünïcödé 漢字 🙂‍↔️ \u200f\t\r\n", "x = 1234.5 # 67", "\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.tokenize("2024") == list("2024")
    assert tokenizer.bos_token == tokenizer.eos_token == END_OF_TEXT != tokenizer.pad_token
    assert tokenizer("the")["input_ids"][0] == tokenizer.bos_token_id
    check_tokenizer(TokenData(tmp_path / "data"), tmp_path / "data" / "tokenizer", vocab_size=len(tokenizer))


def test_tokens_on_disk_are_the_documents(tmp_path):
    written = [*texts(200), f"not the end: {END_OF_TEXT} of it", "ß" * 50]
    write_jsonl(tmp_path / "a.jsonl", written)
    section = {"kind": "files", "path": str(tmp_path / "a.jsonl"), "held_out": 0.1}
    manifest = prepare(configure({"mine": section}), None, tmp_path / "data", seed=0)
    data = TokenData(tmp_path / "data")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data" / "tokenizer")
    assert manifest == data.manifest
    expected = by_split(Files(path=section["path"], held_out=0.1).texts(seed=0))
    for split, documents in expected.items():
        tokens, offsets = data.tokens("mine", split), data.offsets("mine", split)
        parts = [tokens[start:end].tolist() for start, end in pairwise(offsets)]
        end = tokenizer.eos_token_id  # it also starts a document
        assert all(part[0] == part[-1] == end and part.count(end) == 2 for part in parts)
        assert [tokenizer.decode(part[1:-1]) for part in parts] == documents
        assert manifest.sources["mine"].splits[split].num_bytes == sum(len(text.encode()) for text in documents)


def test_the_tokenizer_learns_from_the_training_split_only(tmp_path):
    class Odd:
        is_generated = False

        def texts(self, seed):
            yield "train", "ordinary words " * 20
            yield "held_out", "QQQQQQQQ " * 500

    read = []
    tokenizer = train_tokenizer({"odd": Odd()}, 280, 10_000, seed=0, progress=read.append)
    assert "ordinary" in tokenizer.get_vocab() and "QQ" not in tokenizer.get_vocab()
    assert sum(read) == len("ordinary words " * 20)


def test_a_parents_tokenizer_is_used_as_it_is(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(300))
    sources = {"mine": {"kind": "files", "path": str(tmp_path / "a.jsonl"), "held_out": 0.1}}
    prepare(configure(sources), None, tmp_path / "first", seed=0)
    tokenizer = load_tokenizer(tmp_path / "first" / "tokenizer")
    tokenizer.add_special_tokens({"bos_token": "<s>"})  # a family whose documents start with a token of their own
    tokenizer.backend_tokenizer.post_processor = type(tokenizer.backend_tokenizer.post_processor)(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path / "parent")
    manifest = prepare(configure(sources), tmp_path / "parent", tmp_path / "second", seed=0)
    data = TokenData(tmp_path / "second")
    check_tokenizer(data, tmp_path / "parent")
    with pytest.raises(ValueError, match="another vocabulary"):
        check_tokenizer(data, tmp_path / "first" / "tokenizer")
    starts = data.tokens("mine", "train")[data.offsets("mine", "train")[:-1]]
    assert set(starts.tolist()) == {tokenizer.bos_token_id} == {manifest.bos_token_id}
    with pytest.raises(ValueError, match="no such directory"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("sources", "values", "message"),
    [
        ({"x": {"kind": "poems"}}, {}, r"prepare_data\.sources\.x\.kind: got 'poems'; allowed: bible"),
        ({"x": {"kind": "bible", "max_char": 3}}, {}, r"sources\.x\.max_char: unknown parameter; did you mean"),
        ({"x": {"kind": "files", "path": "a", "held_out": 1.0}}, {}, r"sources\.x\.held_out: got 1.0"),
        ({"a/b": {"kind": "bible"}}, {}, "sources: got 'a/b'"),
        ({}, {}, "one source or more"),
        ({"x": {"kind": "bible"}}, {"vocab_size": 100}, "vocab_size: got 100; allowed: 263 or more"),
    ],
)
def test_a_wrong_section_says_where_to_change_it(sources, values, message):
    with pytest.raises(ConfigError, match=message):
        configure(sources, **values)


def test_an_empty_split_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one document"])
    section = {"kind": "files", "path": str(tmp_path / "a.jsonl"), "held_out": 0.001}
    with pytest.raises(ValueError, match=r"sources\.mine: got no document in held_out"):
        prepare(configure({"mine": section}), None, tmp_path / "data", seed=0)
    assert not (tmp_path / "data").exists()


def test_a_kill_in_the_middle_leaves_what_was_there(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(300))
    section = {"kind": "files", "path": str(tmp_path / "a.jsonl"), "held_out": 0.1}
    out = tmp_path / "data"
    script = f"""
import os, signal
from tasks import prepare_data
from elastic_core.config import load
prepare_data.write_evaluation = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # all tokens are written by then
config = load(prepare_data.PrepareData, {{"sources": {{"mine": {section!r}}}, "vocab_size": 300}}, "test")
prepare_data.prepare(config, None, {str(out)!r}, seed=0)
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True)  # a fork would inherit locked threads
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists() and (tmp_path / ".data.partial").exists()
    prepare(configure({"mine": section}), None, out, seed=0)
    first = TokenData(out).manifest
    assert not (tmp_path / ".data.partial").exists()
    prepare(configure({"mine": section | {"max_characters": 5000}}), None, out, seed=0)  # replaces
    assert TokenData(out).manifest != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "data"]


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 1 << 14)
    write_jsonl(tmp_path / "a.jsonl", texts(20))
    section = {"kind": "files", "path": str(tmp_path / "a.jsonl"), "held_out": 0.2}
    prepare(configure({"mine": section}), None, tmp_path / "first", seed=0)
    tokenizer = load_tokenizer(tmp_path / "first" / "tokenizer")
    peaks, sizes = [], []
    for copies in (2, 16):  # the smaller one already fills all batches that are in memory at once
        path = tmp_path / f"{copies}.jsonl"
        write_jsonl(path, texts(400 * copies))
        source = Files(path=str(path), held_out=0.2)
        (tmp_path / f"out{copies}").mkdir()
        tracemalloc.start()
        prepare_data._tokenise({"mine": source}, tokenizer, Preparation(tmp_path / f"out{copies}"), seed=0, threads=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(path.stat().st_size)
    assert sizes[1] > 7 * sizes[0] and peaks[1] < 1.5 * peaks[0]


def test_sources_are_read_as_they_are_needed(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(10))
    with (tmp_path / "a.jsonl").open("a", encoding="utf-8") as file:
        file.write("broken\n")
    assert len(list(islice(Files(path=str(tmp_path / "a.jsonl")).texts(seed=0), 10))) == 10
