"""Loads a tokenizer with transformers. Its files are checked first, because transformers does not name a broken one."""

from __future__ import annotations

import os
from pathlib import Path

from tokenizers import Tokenizer

from elastic_core.errors import UserError
from elastic_core.io.filesystem import Location
from elastic_core.io.json_files import parse_json, read_content
from elastic_core.io.tokenizer_files import TOKENIZER_FILES, TOKENIZERS

# What transformers raises for files with JSON of another structure than it expects.
LOAD_ERRORS = (ImportError, OSError, ValueError, LookupError, TypeError, AttributeError)

WITH_UNKNOWN = ("WordLevel", "WordPiece")  # models that need a token for words that they do not know


def load_tokenizer(directory: str | os.PathLike, name: str | os.PathLike | None = None, **options):
    """The tokenizer of a local directory.

    - `name`: the directory's name in messages, if it is a local copy.
    - `options`: of transformers' `AutoTokenizer.from_pretrained`.

    Raises UserError with the file's name for JSON files of the model that are broken, and for other damage.
    """
    from transformers import AutoTokenizer  # imported here because the import is slow

    check_json_files(directory, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, **options)
        tokenizer("a")  # some values of wrong types are used only here
        return tokenizer
    except LOAD_ERRORS as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"tokenizer {str(name or directory)!r}: cannot be loaded ({text}); copy its files again"
        ) from None


def require_tokenizer(directory: Path) -> None:
    """Raise UserError unless a model directory has a tokenizer."""
    if not any((directory / name).is_file() for name in TOKENIZERS):
        raise UserError(f"{directory}: no tokenizer ({' or '.join(TOKENIZERS)}); copy the parent's tokenizer to it")


def check_json_files(directory: str | os.PathLike, name: str | os.PathLike | None = None) -> None:
    """Raise UserError, with the file's name, for a broken config.json, generation_config.json or tokenizer file."""
    for file in ("config.json", *TOKENIZER_FILES):
        if file.endswith(".json") and (Path(directory) / file).is_file():
            check_json_file(Path(directory) / file, f"{name or directory}/{file}")


def check_json_file(path: Location, name: Location | None = None) -> None:
    """Raise UserError for a broken JSON file of a model, local or at a URL. `name`: its name in messages.

    A tokenizer.json has to hold a tokenizer: the library transformers does not say what is wrong with it.
    """
    data = read_content(path)
    content = parse_json(data, name or path)
    if not str(path).endswith("tokenizer.json"):
        return
    try:
        Tokenizer.from_buffer(data)  # the bytes, because a name that is there twice is lost in `content`
    except ValueError as error:
        raise UserError(f"{name or path}: is not a tokenizer ({error}); copy it again") from None
    if not isinstance(content.get("added_tokens"), list):
        raise UserError(f"{name or path}: is not a tokenizer (no added_tokens); copy it again")
    model = content["model"]
    if model.get("type") in WITH_UNKNOWN and model["unk_token"] not in model["vocab"]:  # fails at the first such word
        raise UserError(f"{name or path}: its unk_token {model['unk_token']!r} is not in its vocabulary; copy it again")
