"""Files as they come: compressed, with byte-order marks, of any line end, nested, with rows that hold no text."""

import gzip
import json
import os
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from elastic_core.data.loader import TokenData
from elastic_core.errors import UserError
from elastic_core.io import storage
from tasks import prepare_data
from tasks.corpora.inputs import Input
from tasks.corpora.text_sources import Files
from tasks.prepare_data import prepare
from tests.support.pipeline.corpora import configure, texts, write_jsonl

LINES = ["The boat leaves at nine.", "Drei Möwen – 三只海鸥 🙂", "By noon the harbour is empty."]
JSONL = "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in LINES).encode()
ARRAY = json.dumps([{"text": line} for line in LINES], indent=1, ensure_ascii=False).encode()


def read(path, **values):
    return [text for _, text in Files(path=str(path), **values).texts(seed=0)]


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL),
        ("a.json", ARRAY),
        ("b.json", JSONL),
        ("A.JSONL", JSONL),
        ("a.Json", ARRAY.replace(b"\n", b" ")),
    ],
)
@pytest.mark.parametrize("kind", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "crlf", "no last line end"])
def test_every_spelling_of_a_file_gives_the_same_documents(tmp_path, name, content, kind, compression):
    if kind == "crlf":
        content = b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")
    elif kind == "no last line end":
        content = content.rstrip()
    else:
        content = content.decode().encode(kind)
    path = tmp_path / (name + (compression.upper() if name.startswith("A") else compression))
    path.write_bytes(COMPRESS[compression](content))
    assert read(path) == LINES


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_a_text_file_has_no_mark_and_no_carriage_return(tmp_path, encoding, line_end, compression):
    text = "".join(f"{line}\n" for line in LINES * 500) + "no line end"
    path = tmp_path / ("a.TXT" + compression)
    path.write_bytes(COMPRESS[compression](text.replace("\n", line_end).encode(encoding)))
    parts = read(path)
    assert "".join(parts) == text and len(parts) > 2 and all(part.endswith("\n") for part in parts[:-1])


def test_line_ends_inside_strings_are_unified_and_other_characters_kept(tmp_path):
    text = "a\r\nb\n\rc\u2028d\x85e\ufefff\x00\t"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps([{"text": text}]), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), tmp_path / "c.parquet")
    assert read(tmp_path / "*") == ["a\nb\n\rc\u2028d\x85e\ufefff\x00\t"] * 3


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_all_members_of_a_compressed_file_are_read(tmp_path, compression):
    compress = COMPRESS[compression]
    documents = texts(3000)
    lines = [json.dumps({"text": text}) + "\n" for text in documents]
    cut = "".join(lines)[:100_003].encode()  # inside a line
    rest = "".join(lines)[100_003:].encode()
    (tmp_path / f"a.jsonl{compression}").write_bytes(compress(cut) + compress(b"") + compress(rest))
    assert read(tmp_path / "*") == documents


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_a_damaged_compressed_file_is_named(tmp_path, name, compression):
    content = {"a.jsonl": JSONL, "a.json": ARRAY, "a.txt": b"".join(b"%d\n" % i for i in range(50_000))}[name]
    whole = COMPRESS[compression](content)
    path = tmp_path / (name + compression)
    reason = f"({compression} data are truncated or damaged|not a {compression} file)"
    for damaged in (whole[:-5], whole[: len(whole) // 2], whole + whole[:-5], whole[:3], whole + b"rest", b"text", b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{name}{compression}: .*{reason}"):
            read(path)


@pytest.mark.parametrize(
    "kind",
    [pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())],
    ids=str,
)
def test_columns_of_text_of_every_type(tmp_path, kind):
    table = pyarrow.table({"text": pyarrow.array(LINES, pyarrow.string()).cast(kind), "n": range(len(LINES))})
    pyarrow.parquet.write_table(table, tmp_path / "a.PARQUET")
    assert pyarrow.parquet.read_schema(tmp_path / "a.PARQUET").field("text").type == kind
    assert read(tmp_path / "*") == LINES


def test_nested_fields(tmp_path):
    rows = [
        {"id": 1, "meta": {"url": "u", "body": {"text": "one"}}},
        {"id": 2, "meta": {"url": "u", "body": {"text": None}}},
        {"id": 3, "meta": {"url": "u", "body": None}},
        {"id": 4, "meta": None},
        {"id": 5, "meta": {"url": "u", "body": {"text": "two"}}},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    skipped = Counter()
    found = Files(path=str(tmp_path / "*"), text_field="meta.body.text").texts(0, skipped)
    assert [text for _, text in found] == ["one", "two"] * 3 and skipped == {"null": 9}
    for name in ("a.jsonl, line 1", "b.json, line 1, item 1", "c.parquet"):
        path = tmp_path / name.split(",")[0]
        fields = r"\(fields: 'id', 'meta\.url', 'meta\.body\.text'\)"
        with pytest.raises(UserError, match=rf"{name}: no field 'meta\.text' {fields}; set text_field"):
            read(path, text_field="meta.text")


def test_a_name_with_a_dot_comes_before_a_path(tmp_path):
    row = {"a.b": "by name", "a": {"b": "by path"}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "b.parquet")
    assert read(tmp_path / "*", text_field="a.b") == ["by name"] * 2


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pyarrow.array([["x", "y"]]), r"the column 'text' holds list<.*string>, not text"),
        (pyarrow.array([b"x"]), r"the column 'text' holds binary, not text"),
        (pyarrow.array([1]), r"the column 'text' holds int64, not text"),
        (pyarrow.array([{"role": "user"}]), r"the column 'text' holds an object with the fields 'role', not text"),
    ],
)
def test_a_column_that_is_not_text_is_refused_with_its_type(tmp_path, column, message):
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: " + message):
        read(tmp_path / "*")


@pytest.mark.parametrize("value", [["x"], {"a": "x"}, 1.5, True])
def test_a_value_that_is_not_text_is_refused_with_its_type(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": value}))
    with pytest.raises(UserError, match=rf"a\.jsonl, line 1: 'text' must be text, got {type(value).__name__}"):
        read(tmp_path / "*")


def without_text(tmp_path):
    """Files with rows that hold no text: path of the file → (place of the first such row, what is counted)."""
    rows = [{"text": "one"}, {"text": None}, {"text": " \n\t"}, {"text": ""}, {"text": "two"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    counts = {"null": 1, "empty": 2}
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "blank.jsonl").write_text('{"text": "one"}\n\n \r\n{"text": "two"}\n\n')
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    return {
        tmp_path / "a.jsonl": ("line 2", counts),
        tmp_path / "blank.jsonl": ("line 2", {"empty": 3}),
        tmp_path / "b.json": ("line 5, item 2", counts),
        tmp_path / "c.parquet": ("row 2", counts),
    }


def test_rows_without_text_are_counted_or_refused(tmp_path):
    for path, (place, counts) in without_text(tmp_path).items():
        skipped = Counter()
        found = list(Files(path=str(path)).texts(0, skipped))
        assert [text for _, text in found] == ["one", "two"] and skipped == counts
        reason = next(iter(counts))
        with pytest.raises(UserError, match=rf"{path.name}, {place}: the text is {reason}; `strict: false` skips"):
            read(path, strict=True)


def test_a_column_of_nulls_holds_no_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [None, None]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="the files hold no text"):
        read(tmp_path / "*")


def test_skipped_rows_are_in_the_manifest_and_shown(tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "a.jsonl", [*texts(200), None, "", None])
    write_jsonl(tmp_path / "b.jsonl", texts(200, seed=1))
    sources = {name: {"kind": "files", "path": str(tmp_path / f"{name}.jsonl"), "held_out": 0.1} for name in "ab"}
    manifest = prepare(configure(sources), None, tmp_path / "data", seed=0)
    assert manifest.sources["a"].skipped_rows == {"null": 2, "empty": 1} and manifest.sources["b"].skipped_rows == {}
    assert TokenData(tmp_path / "data").manifest == manifest
    prepare_data.print_summary(
        manifest, tmp_path / "data", {"b": {"rank": 50}}
    )  # long texts are split: nothing is lost
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(" held_out; skipped rows: 2 null, 1 empty") and second.endswith(" held_out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("corpus", r"path '.*corpus': a directory; name its files, such as '.*corpus/\*\*/\*\.jsonl'"),
        ("corpus/*.txt", r"path '.*': no file matches it \(relative to"),
        ("nowhere/a.jsonl", r"path '.*': no file matches it"),
        ("link.jsonl", r"link\.jsonl: a link to gone\.jsonl, which does not exist"),
        ("*.jsonl", r"link\.jsonl: a link to gone\.jsonl, which does not exist"),
        (
            "corpus/table.parquet.gz",
            r"cannot read '\.parquet\.gz' files; allowed: \.txt, \.jsonl, \.json \(each also with",
        ),
        ("corpus/README", "README: cannot read files without a suffix; allowed"),
        ("corpus/a.gz", r"a\.gz: cannot read '\.gz' files; allowed"),
    ],
)
def test_what_can_be_known_without_reading_is_refused_by_paths(tmp_path, name, message):
    (tmp_path / "corpus").mkdir()
    for file in ("a.jsonl", "table.parquet.gz", "README", "a.gz"):
        (tmp_path / "corpus" / file).touch()
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(UserError, match=message):
        Input(str(tmp_path / name)).paths()


def test_paths_are_the_files_and_their_sizes(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt.zst").write_bytes(b"not opened")
    (tmp_path / "a.TXT").write_bytes(b"123")
    expected = {str(tmp_path / "a.TXT"): 3, str(tmp_path / "deep" / "b.txt.zst"): 10}
    assert Input(str(tmp_path / "**")).paths() == expected


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", LINES)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK)  # root may read every file
    with pytest.raises(UserError, match=r"a\.jsonl: no permission to read it"):
        Input(str(tmp_path / "*")).paths()


def test_a_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", LINES)
    gone = Files(path=str(tmp_path / "a.jsonl"))
    found = Input(gone.path).paths()
    monkeypatch.setattr(storage, "glob", lambda _: {**found, str(tmp_path / "b.jsonl"): 1})
    monkeypatch.setattr(os, "access", lambda *_: True)
    with pytest.raises(UserError, match=r"b\.jsonl: cannot read it \(No such file or directory\)"):
        list(gone.texts(0))


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts(500)}), path, row_group_size=100)
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:-9], whole[:1000], whole[:middle] + bytes(2000) + whole[middle + 2000 :], b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.parquet: not a readable parquet file"):
            read(path)


def test_empty_files_beside_others_hold_no_rows(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", LINES)
    (tmp_path / "b.jsonl").touch()
    (tmp_path / "c.txt").touch()
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "e.json").write_bytes(b"[]")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "f.parquet")
    assert read(tmp_path / "*") == LINES == read(tmp_path / "*", strict=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "fine\n".encode("utf-16") + b"\x00\xd8\n\x00", r"line 2: not valid UTF-16-LE"),
        ("a.jsonl", JSONL.decode().encode("utf-16") + b"\x00", r"line 4: not valid UTF-16-LE"),
        ("a.jsonl.gz", gzip.compress(JSONL + b'{"text": "\xff"}\n'), r"line 4: not valid UTF-8"),
        ("a.json", b'[{"text": "x"},\n{"text": "\xff"}]', r"line 2: not valid UTF-8"),
    ],
)
def test_text_that_is_not_valid_is_named_by_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}, {message}"):
        read(tmp_path / "*")


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.json.gz", "a.txt.gz", "a.parquet"])
def test_a_compressed_corpus_from_s3(s3, tmp_path, name):
    path = tmp_path / name
    content = {"a.jsonl.zst": zstd(JSONL), "a.json.gz": gzip.compress(ARRAY), "a.txt.gz": gzip.compress(JSONL * 9)}
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"m": {"text": line}} for line in LINES]), path)
    else:
        path.write_bytes(content[name])
    url = storage.join(s3.place, name)
    storage.upload(path, url)
    field = {"text_field": "m.text"} if name == "a.parquet" else {}
    assert Input(url).paths() == {url: path.stat().st_size}
    assert read(url, **field) == read(path, **field)
    if name != "a.parquet":
        storage.write_bytes(url, path.read_bytes()[:-5])
        with pytest.raises(UserError, match=rf"s3://.*{name}: cannot read it \(the {path.suffix} data are truncated"):
            read(url)
    with pytest.raises(UserError, match=r"path 's3://[^']*': a directory; name its files"):
        Input(s3.place).paths()
