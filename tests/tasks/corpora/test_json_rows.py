"""Arrays are read as json.loads reads them, in little memory, and what is wrong is named by line and item."""

import io
import json
import random
import re
import tracemalloc

import pytest

from elastic_core.errors import UserError
from tasks.corpora import json_rows


def read(text, field="text", reader=json_rows.read_array):
    return [value for _, value in reader(io.StringIO(text), "a.json", field)]


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("layout", [{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_an_array_is_read_as_the_parser_reads_it_whole(monkeypatch, block, layout):
    monkeypatch.setattr(json_rows, "_BLOCK", block)
    rng = random.Random(0)
    characters = ['"', "\\", "\n", "\r\n", "🙂", "é", "[", "]", "{", "}", ",", " ", "a", "\x00"]
    others = [None, True, -1.5e-9, 10**20, [], {}, [[1], {"text": ["]"]}], float("nan"), "\\u00e9"]
    rows = [
        {
            "n": rng.choice(others),
            "text": "".join(rng.choices(characters, k=rng.randrange(40))),
            "m": rng.choice(others),
        }
        for _ in range(60)
    ]
    text = json.dumps(rows, **layout)
    assert read(f" \n{text}\n ") == [row["text"] for row in json.loads(text)]
    assert read("[ ]") == [] and read("[]") == []


@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "x"}', "line 1: not valid JSON .expected ',' or ']', got the end of the file"),
        ('[{"text": "x"},', "line 1, item 2: not valid JSON"),
        ('[{"text": "x"},\n]', "line 2, item 2: not valid JSON"),
        ('[{"text": "x"}\n{"text": "y"}]', "line 2: not valid JSON .expected ',' or ']', got '{'"),
        ('[{"text": "x"}]\n[]', r"line 2: not valid JSON \(text after the end of the array"),
        ('[{"text": "x"},\n{"text":\n"y}]', "line 3, item 2: not valid JSON .Unterminated string"),
        ('[{"text": "x"},\n{"text":\n"y" "z"}' + ", {}" * 20, "line 3, item 2: not valid JSON .Expecting ','"),
        ('[{"text": "x"},\n\n{"body": "y"}]', r"line 3, item 2: no field 'text' \(fields: 'body'\)"),
        ('[{"text": "x"}, ["y"]]', "line 1, item 2: expected an object, got list"),
        ('[{"text": "a", "text": "b"}]', "line 1, item 1: .*the field 'text' occurs twice"),
        ('[{"text": ' + "[" * 100_000 + "]" * 100_000 + "}]", "line 1, item 1: JSON that cannot be read .*recursion"),
        ('[{"text": "x", "n": ' + "1" * 10_000 + "}]", "line 1, item 1: JSON that cannot be read .*digits"),
    ],
)
def test_a_bad_array_is_named_with_line_and_item(monkeypatch, block, text, message):
    monkeypatch.setattr(json_rows, "_BLOCK", block)
    with pytest.raises(UserError, match=r"a\.json, " + message):
        read(text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "recursion"),
        ('{"text": "x", "n": ' + "1" * 10_000 + "}", "digits"),
    ],
)
def test_lines_that_the_parser_cannot_read_are_named(line, message):
    with pytest.raises(UserError, match=rf"a\.json, line 2: JSON that cannot be read .*{message}"):
        read('{"text": "x"}\n' + line, reader=json_rows.read_lines)


@pytest.mark.parametrize(
    ("record", "field", "name"),
    [
        ('{"text": "a", "id": 1, "text": "b"}', "text", "text"),
        ('{"text": "a", "text": "a much longer text"}', "text", "text"),
        ('{"text":"a much longer text","text":""}', "text", "text"),
        ('{"text": "x", "text": null}', "text", "text"),
        ('{"meta": {"text": "x"}, "meta": {"text": "y"}}', "meta.text", "meta"),
        ('{"meta": {"text": "x", "text": "y"}}', "meta.text", "text"),
        ('{"meta.text": "x", "meta.text": "y"}', "meta.text", "meta.text"),
    ],
)
def test_a_field_of_text_that_occurs_twice_is_refused(record, field, name):
    message = f"the field {re.escape(repr(name))} occurs twice in one object"
    with pytest.raises(UserError, match=rf"a\.json, line 2: {message}"):
        read("\n" + record, field, json_rows.read_lines)
    with pytest.raises(UserError, match=rf"a\.json, line 2, item 1: {message}"):
        read(f"[\n{record}]", field)


def test_the_name_of_the_field_may_stand_elsewhere():
    line = json.dumps({"text": '"text": "text"', "kind": "text", "meta": {"text": "other"}, "a": ["text"]})
    assert read(line, reader=json_rows.read_lines) == read(f"[{line}]") == ['"text": "text"']


def test_fields_that_do_not_matter_may_be_odd():
    line = '{"id": NaN, "id": Infinity, "text": "x", "meta": {"a": 1, "a": 2}}'
    assert read(line, reader=json_rows.read_lines) == read(f"[{line}]") == ["x"]


class Endless(io.TextIOBase):
    """An array of many items, made as it is read."""

    def __init__(self, items, length):
        self.left, self.text, self.item = items, "[", json.dumps({"text": "x" * length})

    def read(self, size):
        while len(self.text) < size and self.left:
            self.left -= 1
            self.text += self.item + ("," if self.left else "]")
        part, self.text = self.text[:size], self.text[size:]
        return part


def test_an_array_is_never_in_memory_as_a_whole(monkeypatch):
    monkeypatch.setattr(json_rows, "_BLOCK", 1 << 14)
    peaks = []
    for items in (100, 3000):
        tracemalloc.start()
        assert sum(1 for _ in json_rows.read_array(Endless(items, 1000), "a.json", "text")) == items
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 500_000


def test_an_error_early_in_an_array_is_found_early():
    endless = Endless(10**9, 1000)
    endless.text = '[{"text": "a" "b"},'
    with pytest.raises(UserError, match="line 1, item 1: not valid JSON"):
        list(json_rows.read_array(endless, "a.json", "text"))
    assert endless.left > 10**9 - 5000
