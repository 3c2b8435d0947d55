"""Read the headers of safetensors files, local or at a URL, and say what is wrong with a damaged file.

A safetensors file is the length of its header (8 bytes), a JSON header with dtype, shape and offsets of every tensor,
and the tensors' bytes. So the header alone shows whether the file is whole. No weights are read.
"""

import json
import math

from elastic_core.errors import UserError
from elastic_core.io import storage
from elastic_core.io.filesystem import Location

MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_READ_BYTES = 1 << 16  # one request of a URL: the header of a small file
_START_BYTES = 256  # enough to recognise another kind of file
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32},
    **{"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
}


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
            if (kind := _other_kind(start)) is not None:
                raise UserError(f"{location}: {kind}")
            length = int.from_bytes(start[:8], "little")
            if length > min(size - 8, MOST_HEADER_BYTES):
                raise UserError(
                    f"{location}: is truncated or not a safetensors file: it has {size:,} bytes, and its first 8 bytes "
                    f"announce a header of {length:,}; copy it again"
                )
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
    """The header's tensors. Raises UserError unless they fill the file without gaps."""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
        end = 0
        for start, stop, name in spans:
            bits = math.prod(header[name]["shape"]) * _BITS.get(header[name]["dtype"], 0)
            if start != end or stop < start or (bits and bits != 8 * (stop - start)):
                raise ValueError(f"{name} has wrong offsets")
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{location}: is not a safetensors file, or its header is damaged ({error}); copy it again"
        ) from None
    return header
