"""A damaged JSON file is named in the error."""

import pytest

from elastic_core.errors import UserError
from elastic_core.io.json_files import read_json
from elastic_core.model import hf


def test_values_are_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, null]}')
    assert read_json(tmp_path / "a.json") == {"a": [1, None]}


@pytest.mark.parametrize("content", [b'{"model_type": "nemo', b"", b"\xff\xfe{}"])
def test_a_damaged_configuration_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json: is not valid JSON"):
        hf.read_config(tmp_path)
