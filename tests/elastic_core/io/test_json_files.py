"""A damaged JSON file is named in the error."""

import json

import pytest

from elastic_core.errors import UserError
from elastic_core.io.json_files import read_json
from elastic_core.model import hf


def test_values_are_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, null, "\\ud83d\\ude00"]}')
    assert read_json(tmp_path / "a.json") == {"a": [1, None, "😀"]}


DAMAGE = {
    b'{"model_type": "nemo': "is not valid JSON",
    b"": "is empty",
    b" \n": "is empty",
    b"\xff\xfe{}": "is not valid JSON",
    b"[1]": "holds a JSON list; expected an object",
    b"null": "holds a JSON NoneType",
    b"[" * 100_000: "is not valid JSON .nested too deeply",
    b"[" * 800 + b"]" * 800: "is nested too deeply",
    b'{"a": {"\\ud800": 1}}': "is not valid JSON",
    b'{"a": ["x\\uDC00"]}': "is not valid JSON",
}


@pytest.mark.parametrize("content", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_configuration_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.json: {DAMAGE[content]}"):
        hf.read_config(tmp_path)
    with pytest.raises(UserError, match=rf"file://.*config\.json: {DAMAGE[content]}"):
        read_json(f"file://{tmp_path}/config.json")


@pytest.mark.parametrize(
    "wrong",
    [
        *({"hidden_size": "x"}, {"hidden_size": None}, {"num_key_value_heads": 0}, {"rope_parameters": "x"}),
        *({"rope_parameters": {"rope_type": "yarn"}}, {"dtype": "float99"}, {"hidden_act": "x"}, {"vocab_size": -3}),
        *({"model_type": ["llama"]}, {"tie_word_embeddings": "yes"}, {"layer_types": ["x"]}, {"num_hidden_layers": 0}),
    ],
    ids=str,
)
def test_a_value_of_a_wrong_type_or_size_is_refused_with_its_name(tmp_path, wrong):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, **wrong}))
    with pytest.raises(UserError, match=f"{tmp_path}.*{next(iter(wrong))}|{tmp_path}.*(rope_parameters|float99)"):
        hf.read_config(tmp_path)
