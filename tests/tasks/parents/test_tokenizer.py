"""Tokenizers of parents as they are published."""

import json
import re

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from elastic_core.errors import UserError
from tasks.parents.tokenizer import load_tokenizer
from tests.support.models.real_parents import NANO_12B


@pytest.mark.parametrize("said", [{"tokenizer_class": "PreTrainedTokenizerFast"}, {}], ids=["class", "no class"])
def test_a_tokenizer_is_loaded_without_the_models_own_code(tmp_path, said):
    """Beside a config.json that asks for code, which ends the process where it is imported."""
    (tmp_path / "config.json").write_text(json.dumps(NANO_12B))
    for name in ("configuration_nemotron_h.py", "modeling_nemotron_h.py"):
        (tmp_path / name).write_text("raise SystemExit('remote code was run')\n")
    tokenizer = Tokenizer(models.WordLevel({"<end>": 0, "a": 1}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    values.pop("tokenizer_class")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values | said))
    assert load_tokenizer(tmp_path).eos_token_id == 0


def letters(**changes) -> bytes:
    """A tokenizer.json, with changes."""
    values = json.loads(Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>")).to_str())
    return json.dumps(values | changes).encode()


BROKEN = [
    *(("tokenizer.json", content) for content in (b"", b'{"a', b"\xff", b"[]", b"{}", b'{"model": {"vocab": {}}}')),
    *(("tokenizer.json", letters(**change)) for change in ({"model": {"type": "BPE"}}, {"added_tokens": [{"id": 1}]})),
    *(("tokenizer_config.json", content) for content in (b"", b"[1]", b'{"eos_token": 5}', b'{"tokenizer_class": 5}')),
    *(
        (f"{name}.json", b)
        for name in ("special_tokens_map", "added_tokens", "generation_config")
        for b in (b"{", b"[]")
    ),
    *(("config.json", content) for content in (b"", b"[]", b"\xff")),
]


@pytest.mark.parametrize("name, content", BROKEN)
def test_a_broken_file_is_named(tmp_path, name, content):
    tokenizer = Tokenizer(models.WordLevel({"<end>": 0, "a": 1}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    is_known = content.startswith(b'{"eos') or content.startswith(b'{"tokenizer_class')  # only transformers reads these
    words = f"tokenizer '{tmp_path}': cannot be loaded" if is_known else f"{tmp_path}/{name}: "
    with pytest.raises(UserError, match=re.escape(words)):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=re.escape(words.replace(str(tmp_path), f"file://{tmp_path}"))):
        load_tokenizer(f"file://{tmp_path}")
