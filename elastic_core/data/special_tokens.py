"""The special tokens of a model directory: the same ids in config.json, generation_config.json and the tokenizer.

Programs that serve models read different ones of these files. So bos, eos and pad are the same in all of them. The eos
ids stop generation: they include the token that ends an assistant's turn in the chat template.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from elastic_core.data.chat_template import end_of_turn_id
from elastic_core.data.tokenizer import load_tokenizer
from elastic_core.errors import UserError
from elastic_core.io.json_files import read_json
from elastic_core.io.tokenizer_files import TOKENIZERS, copy_companions, copy_tokenizer

FILE = "generation_config.json"
NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")


def generation_values(config, source: str | os.PathLike | None) -> dict:
    """The content of generation_config.json for a model whose tokenizer files are in the directory `source`.

    It has all values of the file in `source`, if there is one. To the eos ids there (without the file: those in
    config.json), it adds the tokenizer's eos and the end of an assistant's turn. bos and pad are the tokenizer's, if it
    has them. Without such files, or with `source` None, all are those of `config`.

    Raises UserError for files in `source` that are damaged.
    """
    given, stored = _read(source, FILE), _read(source, "config.json")
    has_tokenizer = source is not None and any((Path(source) / name).is_file() for name in TOKENIZERS)
    tokenizer = load_tokenizer(source) if has_tokenizer else None
    if tokenizer is None and not given and not stored:
        stored = {name: getattr(config, name, None) for name in NAMES}
    eos = _ids(given, "eos_token_id", source) or _ids(stored, "eos_token_id", source)
    if tokenizer is not None:
        eos += [end for end in (tokenizer.eos_token_id, end_of_turn_id(tokenizer)) if end is not None]
    eos = list(dict.fromkeys(eos))
    values = dict(given)
    for name in ("bos_token_id", "pad_token_id"):
        own = None if tokenizer is None else getattr(tokenizer, name)
        found = [*([] if own is None else [own]), *_ids(given, name, source), *_ids(stored, name, source)]
        values[name] = found[0] if found else None
    values["eos_token_id"] = eos if len(eos) > 1 else eos[0] if eos else None
    return values


def token_ids(generation: dict) -> dict:
    """The values of config.json that have to be the same as in generation_config.json."""
    return {name: generation[name] for name in NAMES}


def write_text_files(directory: Path, source: str | os.PathLike | None, generation: dict) -> None:
    """Copy the tokenizer files of `source`, its licence and its parsers, and write generation_config.json.

    `generation`: the values of that file. A file in `source` that has the same values is copied as it is.
    """
    if source is not None:
        copy_tokenizer(source, directory)
        copy_companions(source, directory)
    if (directory / FILE).is_file() and read_json(directory / FILE) == generation:
        return
    (directory / FILE).write_text(json.dumps(generation, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read(source: str | os.PathLike | None, name: str) -> dict:
    file = None if source is None else Path(source) / name
    return read_json(file) if file is not None and file.is_file() else {}


def _ids(values: dict, name: str, source) -> list[int]:
    """The token ids of one value: none, one or several. Some configurations write -1 for none."""
    value = values.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(one) is not int for one in ids):
        raise UserError(f"{source}: {name} is {value!r} in {FILE} or config.json; allowed: a token id, a list, or null")
    return [one for one in ids if one >= 0]
