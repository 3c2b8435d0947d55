"""Read the headers of safetensors files, local or at a URL, and say what is wrong with a damaged file.

A safetensors file is the length of its header (8 bytes), a JSON header with dtype, shape and offsets of every tensor,
and the tensors' bytes. So the header alone shows whether the file is whole. No weights are read.
"""

import json
import operator
from itertools import accumulate

from elastic_core.errors import UserError
from elastic_core.io import storage
from elastic_core.io.filesystem import Location
from elastic_core.io.json_files import check_shape

MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_READ_BYTES = 1 << 16  # one request of a URL: the header of a small file
_START_BYTES = 256  # enough to recognise another kind of file
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32},
    **{"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
_MOST = 1 << 64  # sizes and offsets are below it
_ENTRY = {"dtype": str, "shape": [int], "data_offsets": [int]}


def read_raw_header(location: Location) -> tuple[dict[str, dict], int]:
    """(tensor name → dtype, shape and data_offsets, the offset of the first tensor's bytes) of a safetensors file.

    Raises UserError for a missing file, for a file that is longer or shorter than its header says, and for a file of
    another kind. Raises StorageError for a URL that cannot be read.
    """
    try:
        with storage.open_binary(location, _READ_BYTES) as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(min(size, _START_BYTES))
            length = int.from_bytes(start[:8], "little")
            if length > min(size - 8, MOST_HEADER_BYTES):  # also for every other kind of file: it starts with letters
                announced = (
                    f"is truncated or not a safetensors file: it has {size:,} bytes, and its first 8 bytes announce a "
                    f"header of {length:,}; copy it again"
                )
                raise UserError(f"{location}: {_other_kind(start) or announced}")
            text = (start + file.read(max(0, 8 + length - len(start))))[8 : 8 + length]
    except FileNotFoundError:
        raise UserError(f"{location}: is missing; copy the model again") from None
    except IsADirectoryError:
        raise UserError(f"{location}: is a directory, not a safetensors file") from None
    header = _parse(text, location)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != 8 + length + end:
        problem = "is truncated" if size < 8 + length + end else "is too long"
        raise UserError(
            f"{location}: {problem}: it has {size:,} bytes, and its header says {8 + length + end:,}; copy it again"
        )
    return header, 8 + length


def _other_kind(start: bytes) -> str | None:
    """What a file is that does not start like a safetensors file, and what to do about it."""
    if not start:
        return "is empty; copy it again"
    if start.startswith(LFS_POINTER):
        return "is a git-LFS pointer, not the weights; run `git lfs pull` in the clone, or download the file itself"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "is a web page (HTML or XML), not the weights; the download failed, so download the file again"
    if start.startswith(b"PK\x03\x04"):
        return "is a PyTorch or zip file, not a safetensors file; see docs/architectures.md"
    if start.startswith(b"GGUF"):
        return "is a GGUF file, not a safetensors file"
    return None


def _parse(text: bytes, location: Location) -> dict[str, dict]:
    """The header's tensors. Raises UserError unless the safetensors library reads the header, too.

    So every type is checked, and the tensors have to fill the file without gaps. Whatever reads the file later need not
    handle a damaged header.
    """
    try:
        numbers = {"parse_int": _size, "parse_float": _size, "parse_constant": _size}
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_object, **numbers)
        json.dumps(header, ensure_ascii=False).encode("utf-8")  # fails for half a character, such as \ud800
        check_shape(header, dict, location)
        check_shape(header.pop("__metadata__", None), ({str: str}, type(None)), f"{location}: __metadata__")
        check_shape(header, {str: _ENTRY}, location)
        _check_spans(header)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{location}: is not a safetensors file, or its header is damaged ({error}); copy it again"
        ) from None
    return header


def _check_spans(header: dict[str, dict]) -> None:
    """Raise ValueError unless every tensor has the bytes that its shape needs, one tensor directly after the other."""
    for name, entry in header.items():
        counts = list(accumulate(entry["shape"], operator.mul, initial=1))
        if entry.keys() != _ENTRY.keys() or entry["dtype"] not in _BITS or len(entry["data_offsets"]) != 2:
            raise ValueError(f"{name} is {entry}")
        start, stop = entry["data_offsets"]
        if max(counts) >= _MOST or counts[-1] * _BITS[entry["dtype"]] != 8 * (stop - start):
            raise ValueError(f"{name} has wrong offsets")
    end = 0
    for start, stop, name in sorted((*entry["data_offsets"], name) for name, entry in header.items()):
        if start != end:
            raise ValueError(f"{name} has wrong offsets")
        end = stop


def _size(text: str) -> int:
    """A number in a header. Raises ValueError for all but whole numbers of 64 bits, which are the only ones in it."""
    if not text.isdigit() or len(text) > 20 or int(text) >= _MOST:
        raise ValueError(f"got the number {text[:40]}; allowed: whole numbers from 0 to 2^64 - 1")
    return int(text)


def _object(pairs: list[tuple]) -> dict:
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return values
