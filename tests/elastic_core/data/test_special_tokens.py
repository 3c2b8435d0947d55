"""The special tokens of a model directory: one set of ids in all of its files."""

import json
from types import SimpleNamespace

import pytest

from elastic_core.data.special_tokens import generation_values, token_ids, write_text_files
from elastic_core.errors import UserError
from tests.support.models.chat import CHATML, LLAMA3, chat_tokenizer

CONFIG = SimpleNamespace(bos_token_id=7, eos_token_id=2, pad_token_id=None)
TURN = {CHATML: 5, LLAMA3: 8}  # the id of the token that ends a turn


def write(directory, template=None, **files):
    """Files of a parent: a tokenizer (bos and eos 0, pad 1) for a template, and JSON files by name."""
    if template is not None:
        chat_tokenizer(template or None).save_pretrained(directory)
    for name, values in files.items():
        (directory / f"{name}.json").write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize(
    "template, files, expected",
    [
        (CHATML, {}, (0, [0, 5], 1)),
        (LLAMA3, {}, (0, [0, 8], 1)),
        ("", {}, (0, 0, 1)),  # a tokenizer without a template
        (CHATML, {"generation_config": {"eos_token_id": [9, 5, 11]}}, (0, [9, 5, 11, 0], 1)),  # all are kept
        (CHATML, {"generation_config": {"eos_token_id": 5}}, (0, [5, 0], 1)),
        (CHATML, {"generation_config": {"temperature": 0.5}, "config": {"eos_token_id": 9}}, (0, [9, 0, 5], 1)),
        (CHATML, {"generation_config": {"eos_token_id": 9}, "config": {"eos_token_id": 2}}, (0, [9, 0, 5], 1)),
        (CHATML, {"config": {"eos_token_id": [9, 10], "bos_token_id": 3, "pad_token_id": 4}}, (0, [9, 10, 0, 5], 1)),
        (None, {"config": {"eos_token_id": [9, 10], "bos_token_id": 3, "pad_token_id": -1}}, (3, [9, 10], None)),
        (None, {"config": {}, "generation_config": {"eos_token_id": None, "pad_token_id": 4}}, (None, None, 4)),
        (None, {}, (7, 2, None)),  # nothing but the configuration
    ],
)
def test_every_file_has_the_same_ids(tmp_path, template, files, expected):
    found = generation_values(CONFIG, write(tmp_path, template, **files))
    assert tuple(token_ids(found).values()) == expected
    assert found.get("temperature") == files.get("generation_config", {}).get("temperature")


def test_no_directory_at_all():
    assert tuple(token_ids(generation_values(CONFIG, None)).values()) == (7, 2, None)


def test_what_is_written_is_found_again(tmp_path):
    """And what was complete is copied byte by byte."""
    (tmp_path / "a").mkdir()
    directories = tmp_path / "b", tmp_path / "c"
    for directory in directories:
        directory.mkdir()
    write(tmp_path / "a", {"default": CHATML, "tools": LLAMA3}, generation_config={"eos_token_id": 9, "top_p": 0.9})
    values = generation_values(CONFIG, tmp_path / "a")
    write_text_files(tmp_path / "b", tmp_path / "a", values)
    assert values == {"bos_token_id": 0, "eos_token_id": [9, 0, 5], "pad_token_id": 1, "top_p": 0.9}
    assert json.loads((tmp_path / "b/generation_config.json").read_text()) == values
    (tmp_path / "b/generation_config.json").write_text(json.dumps(values))  # in one line
    assert generation_values(CONFIG, tmp_path / "b") == values
    write_text_files(tmp_path / "c", tmp_path / "b", values)
    first, second = ({path.relative_to(d): path.read_bytes() for path in d.rglob("*.j*")} for d in directories)
    assert first == second and len(first) == 5


@pytest.mark.parametrize("value", ["0", 1.0, [0, "1"], True, {}])
def test_ids_of_a_wrong_type_are_named(tmp_path, value):
    with pytest.raises(UserError, match=r"eos_token_id is .* in generation_config\.json or config\.json; allowed: a t"):
        generation_values(CONFIG, write(tmp_path, generation_config={"eos_token_id": value}))
