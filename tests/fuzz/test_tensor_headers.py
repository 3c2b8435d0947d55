"""Headers of safetensors files: what this library accepts, the safetensors library reads in the same way."""

import json

import pytest
import torch
from hypothesis import given
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from elastic_core.errors import UserError
from elastic_core.io.tensor_headers import read_raw_header
from tests.support.fuzzing.broken import broken_tensors, header_of
from tests.support.fuzzing.calls import call, examples

TENSORS = {
    **{"a.weight": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "none": torch.ones(0, 3)},
    **{"scalar": torch.ones(()), "c": torch.ones(3, 1, dtype=torch.int8)},
}
VALID = save(TENSORS, {"format": "pt"})
HEADER, REST = header_of(VALID)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("headers")


def read(scratch, content: bytes, target: str):
    """The header that this library reads, or its UserError. It is the same as that of the safetensors library."""
    file = scratch / "model.safetensors"
    file.unlink(missing_ok=True)  # an earlier call may have mapped it
    file.write_bytes(content)
    end = call(target, scratch, lambda: read_raw_header(file), file)
    if not isinstance(end, UserError):
        with safe_open(file, "pt") as theirs:
            slices = {name: theirs.get_slice(name) for name in theirs.keys()}  # noqa: SIM118
            expected = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
        assert {name: (entry["dtype"], entry["shape"]) for name, entry in end[0].items()} == expected
    return end


def with_header(header, rest: bytes = REST) -> bytes:
    """The tensors after another header: a text or a JSON value."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def changed(name: str, **changes) -> dict:
    return HEADER | {name: HEADER[name] | changes}


def test_a_whole_file_is_accepted(scratch):
    for metadata in ({}, {"format": "pt", "é": "\n"}, None):
        header = {**HEADER, "__metadata__": metadata}
        header, _ = read(scratch, with_header(header), "valid")
        assert header.keys() == TENSORS.keys()


@pytest.mark.parametrize("length", [ord("<"), int.from_bytes(b" <", "little"), int.from_bytes(b"GG\x01", "little")])
def test_a_length_may_look_like_the_start_of_another_file(scratch, length):
    """The first bytes are the length of the header: 60 is the character `<`, with which web pages begin."""
    text = json.dumps({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).replace(" ", "").encode()
    header, _ = read(scratch, with_header(text.ljust(length), b""), "valid")
    assert list(header) == ["a"]


@examples(40)
@given(content=broken_tensors(VALID))
def test_headers(scratch, content):
    read(scratch, content, "safetensors header")


FOUND = [
    *(HEADER | {"__metadata__": value} for value in ("{'format': 'pt'}", True, [], 1e30, {"format": [1]})),
    *(changed("a.weight", shape=shape) for shape in ([2.0, 3], [[2], 3], [True, 6], ["6"], 6, [-2, -3])),
    *(changed("none", shape=shape) for shape in ([[]], [2**63, 2**63, 0], [10**30, 0])),
    *(changed("none", data_offsets=offsets) for offsets in ([0], [0, 0, 0], [None, 0], [-1, -1], [0.0, 0.0])),
    *(changed("b", dtype=dtype) for dtype in ([], None, "bf16", "F128")),
    *(changed("b", other=value) for value in (float("nan"), 10**400)),
    HEADER | {"\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
    *(value.encode() for value in ("[" * 5000, "null", "[]", "NaN", '{"__metadata__": {}, "__metadata__": {}}')),
    json.dumps(HEADER).encode("utf-16"),
    b"\xef\xbb\xbf" + json.dumps(HEADER).encode(),
]


@pytest.mark.parametrize("header", FOUND, ids=range(len(FOUND)))
def test_headers_that_were_found(scratch, header):
    assert isinstance(read(scratch, with_header(header), "found"), UserError)
    with pytest.raises(SafetensorError), safe_open(scratch / "model.safetensors", "pt"):
        pass
