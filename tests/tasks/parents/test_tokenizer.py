"""Tokenizers of parents as they are published."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

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
