"""Finds the safetensors files of a model directory, and says what to do where there are none."""

import os
import re
from pathlib import Path

from elastic_core.errors import UserError
from elastic_core.io import storage
from elastic_core.io.filesystem import Location
from elastic_core.io.json_files import read_json
from elastic_core.io.tensor_headers import read_raw_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PYTORCH_FILE = re.compile(r"pytorch_model.*\.(bin|pt)(\.index\.json)?")
SHARD_BYTES = 5 * 2**30  # the most bytes of a file, for weights that do not come from a sharded model
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def weight_map(directory: Location) -> dict[str, str]:
    """Tensor name in the files → file name, of a directory or URL. Reads the index, or the header of the only file.

    If both exist, the single file counts, as in transformers. Raises UserError for a directory without safetensors
    files, an index that is damaged, and an index that names files that do not exist.
    """
    names = set(storage.list_names(directory))
    if SINGLE in names:
        header, _ = read_raw_header(storage.join(directory, SINGLE))
        return dict.fromkeys(header, SINGLE)
    return _read_index(directory, names)


def weight_file_names(directory: Location, names: set[str] | None = None, conversion: str | None = None) -> set[str]:
    """The names of all files that hold the weights: the single file, or the index and its files.

    `names`: the files that there are, if `directory` has only the index of them yet. `conversion`: what the message of
    a model with only PyTorch's files says about converting it (None: the command for a directory). Raises UserError as
    `weight_map`.
    """
    names = set(storage.list_names(directory)) if names is None else names
    return {SINGLE} if SINGLE in names else {INDEX, *_read_index(directory, names, conversion).values()}


def _read_index(directory: Location, names: set[str], conversion: str | None = None) -> dict[str, str]:
    if INDEX not in names:
        raise UserError(f"{directory}: {_why_none(directory, names, conversion)}")
    place = storage.join(directory, INDEX)
    files = read_json(place).get("weight_map")
    if not isinstance(files, dict) or not files or not all(_is_name(file) for file in files.values()):
        raise UserError(f"{place}: has no valid weight_map (tensor → file name); copy the file again")
    missing = sorted(set(files.values()) - names)
    if missing:
        lost = sum(file in missing for file in files.values())
        raise UserError(
            f"{directory}: lacks {len(missing)} of the {len(set(files.values()))} files that {INDEX} names, with "
            f"{lost} tensors: {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}; copy the model again"
        )
    return files


def shard_bytes(directory: str | os.PathLike | None) -> int:
    """The most bytes of a file of weights that come from a local directory: those of its largest shard, if it has any.

    Also for a directory without weights, and for none.
    """
    shards = [] if directory is None else [path for path in Path(directory).iterdir() if SHARD.fullmatch(path.name)]
    return max((path.stat().st_size for path in shards), default=SHARD_BYTES)


def convert_command(directory: Location) -> str:
    """The command that adds safetensors files to a local directory which has only PyTorch's files."""
    return (
        'python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{directory}').save_pretrained('{directory}')\""
    )


def _is_name(file) -> bool:
    return isinstance(file, str) and file != "" and "/" not in file


def _why_none(directory: Location, names: set[str], conversion: str | None) -> str:
    pytorch = sorted(name for name in names if PYTORCH_FILE.fullmatch(name))
    if pytorch:
        place = "a local copy of it" if storage.is_url(directory) else "it"
        command = convert_command("DIRECTORY" if storage.is_url(directory) else directory)
        conversion = conversion or f"convert {place}: {command}"
        return f"has its weights only as {pytorch[0]}; expected safetensors files; {conversion}"
    shards = sorted(name for name in names if SHARD.fullmatch(name))
    if shards:
        return f"has {shards[0]} but no {INDEX}, which says which tensor is in which file; copy the index too"
    return f"no {SINGLE} and no {INDEX}"
