"""Files of text with broken bytes: read, or refused by one message that names the file."""

import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.corpora.text_sources import Files
from tests.support.fuzzing.broken import broken_bytes, json_values
from tests.support.fuzzing.calls import call, examples

ROWS = [{"text": "one\n", "n": 1}, {"text": "zw\u00f6lf \u65e5", "meta": {"text": "x"}}, {"text": None}, {"text": ""}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1, ensure_ascii=False).encode()
TEXT = "first line\nsecond \u65e5\n".encode()
UTF16 = "first line\n".encode("utf-16")


def parquet(**options) -> bytes:
    table = pyarrow.table({"text": ["one", None, "zw\u00f6lf", ""], "n": [1, 2, 3, 4]})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, **options)
    return buffer.getvalue()


VALID = {
    ".txt": [TEXT, UTF16],
    ".jsonl": [LINES, LINES.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + LINES],
    ".json": [ARRAY, LINES],
    ".txt.gz": [gzip.compress(TEXT), gzip.compress(TEXT) * 2],
    ".jsonl.gz": [gzip.compress(LINES)],
    ".jsonl.zst": [bytes(pyarrow.Codec("zstd").compress(LINES))],
    ".json.zst": [bytes(pyarrow.Codec("zstd").compress(ARRAY))],
    ".parquet": [parquet(), parquet(compression="zstd"), parquet(use_dictionary=False, data_page_version="2.0")],
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("corpora")


def read(scratch, suffix: str, data: bytes, field: str = "text", strict: bool = False) -> None:
    path = scratch / f"a{suffix}"
    path.write_bytes(data)
    source = Files(str(path), text_field=field, strict=strict)
    call(f"corpora {suffix}", scratch, lambda: list(source.texts(0)), path)
    call(f"corpora {suffix}", scratch, source.expected_characters, path, count=False)


@pytest.mark.parametrize("suffix", VALID)
def test_broken_bytes(scratch, suffix):
    for data in VALID[suffix]:
        read(scratch, suffix, data)

    @examples(8)
    @given(data=broken_bytes(VALID[suffix]) | st.binary(max_size=40), strict=st.booleans())
    def check(data, strict):
        read(scratch, suffix, data, strict=strict)

    check()


def test_a_column_name_that_is_not_utf8(scratch):
    read(scratch, ".parquet", parquet().replace(b"text", b"te\xf4t"))


@examples(20)
@given(
    rows=st.lists(json_values, max_size=4),
    suffix=st.sampled_from([".json", ".jsonl"]),
    field=st.sampled_from(["text", "a", "x.y", "a.a", "", ".", "\ud800"]),
)
def test_json_of_any_structure(scratch, rows, suffix, field):
    text = json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    read(scratch, suffix, text.encode(), field)
