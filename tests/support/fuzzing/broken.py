"""Strategies that break valid files: bytes, JSON values, JSON files and safetensors files."""

import copy
import json

from hypothesis import strategies as st

HUGE = (2**31, 2**63, 10**9, 10**30, -(10**9), 10**400)
PLAIN = (None, True, False, 0, -1, 1, 2, 3, 7, 64, 0.5, -0.5, 1e-30, 1e308, float("nan"), float("inf"), float("-inf"))
TEXTS = ("", "x", "1", "null", "../x", "/etc/passwd", "\ud800", "\x00", "a\nb", "é", "x" * 5000, "mamba", "8MB@1×1")
NESTED = ([], {}, [None], [[]], {"": {}}, {"a": 1}, [0], [-1], [1, 2, 3], ["x"], [10**30], [{}], {"x": [1]})
PIECES = (b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b'"', b"{", b"]", b"\\ud800", b"NaN", b"9" * 5000)

odd_values = st.sampled_from([*PLAIN, *HUGE, *TEXTS, *NESTED]).map(copy.deepcopy)


def _objects(inner):
    return st.dictionaries(st.sampled_from(["a", "text", "x.y", "", "\ud800"]), inner, max_size=3)


json_values = st.recursive(odd_values, lambda inner: st.lists(inner, max_size=3) | _objects(inner), max_leaves=6)


@st.composite
def broken_bytes(draw, valid: list[bytes], most: int = 3) -> bytes:
    """One of `valid` after up to `most` changes: bytes flipped, cut out, inserted, duplicated or cut off."""
    data = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, most))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 40)))
        match draw(st.sampled_from(["flip", "flip", "cut", "insert", "random", "duplicate", "truncate"])):
            case "flip" if start < len(data):
                data[start] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[start:stop]
            case "insert":
                data[start:start] = draw(st.sampled_from(PIECES))
            case "random":
                data[start:stop] = draw(st.binary(max_size=12))
            case "duplicate":
                data[start:start] = data[start:stop] * draw(st.sampled_from([1, 1, 100]))
            case "truncate":
                del data[start:]
    return bytes(data)


@st.composite
def broken_json(draw, valid, most: int = 3):
    """A JSON value after up to `most` changes: values replaced, removed, renamed, moved and added, at any depth."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(list(_paths(value))))
        value = _changed(draw, value, path)
    return value


def broken_file(valid, most: int = 3):
    """The bytes of a broken JSON file, most of them valid JSON."""
    text = json.dumps(valid).encode()
    as_json = broken_json(valid, most).map(lambda value: json.dumps(value).encode())
    return st.one_of(as_json, as_json, as_json, broken_bytes([text], most), json_values.map(json.dumps).map(str.encode))


def header_of(data: bytes) -> tuple[dict, bytes]:
    """The header of a safetensors file, and the bytes of its tensors."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@st.composite
def broken_tensors(draw, valid: bytes) -> bytes:
    """A safetensors file with broken bytes, or with a broken header in front of the same tensors."""
    if draw(st.booleans()):
        return draw(broken_bytes([valid]))
    header, rest = header_of(valid)
    text = json.dumps(draw(broken_json(header))).encode()
    length = draw(st.sampled_from([len(text), len(text), len(text) + 1, 0, 2**63, 10**8]))
    return length.to_bytes(8, "little") + text + rest


@st.composite
def broken_metadata(draw, valid: bytes, key: str) -> bytes:
    """A safetensors file in whose metadata the JSON text of `key` is broken, or as `broken_tensors`."""
    if draw(st.booleans()):
        return draw(broken_tensors(valid))
    header, rest = header_of(valid)
    content = json.loads(header["__metadata__"][key])
    header["__metadata__"][key] = draw(broken_file(content)).decode("utf-8", "replace")
    return with_header(header, rest)


def with_header(header: dict, rest: bytes) -> bytes:
    """A safetensors file of a header and the bytes of its tensors."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def _paths(value, path=()):
    """Paths of all parts of a value; of a long list only some."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for number, (key, inner) in enumerate(parts):
        if isinstance(value, dict) or number < 4:
            yield from _paths(inner, (*path, key))


def _changed(draw, value, path: tuple):
    if not path:
        if draw(st.integers(0, 9)):
            return value
        return draw(json_values)
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    key, old = path[-1], owner[path[-1]]
    match draw(st.sampled_from(["replace", "replace", "near", "near", "remove", "add", "wrap", "text"])):
        case "replace":
            owner[key] = draw(json_values)
        case "near" if isinstance(old, (int, float)) and not isinstance(old, bool):
            near = [old + 1, old - 1, -old, old * 2, old * 1000, *([old + 0.5, float(old)] if abs(old) < 1e9 else [])]
            owner[key] = draw(st.sampled_from([*near, *HUGE]))
        case "remove":
            del owner[key]
        case "add" if isinstance(owner, dict):
            owner[f"{key}{draw(st.sampled_from(['', 's', ' ', '.x']))}"] = draw(json_values)
        case "add":
            owner.insert(key, draw(json_values))
        case "wrap":
            owner[key] = draw(st.sampled_from([[old], {"value": old}, [old, old]]))
        case _:
            owner[key] = str(old)
    return value
