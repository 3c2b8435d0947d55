"""Loads a tokenizer with transformers. Its files are checked first, because transformers does not name a broken one."""

from __future__ import annotations

import os
from pathlib import Path

from elastic_core.errors import UserError
from elastic_core.io.json_files import read_json
from elastic_core.io.tokenizer_files import TOKENIZER_FILES

# What transformers raises for files with JSON of another structure than it expects.
LOAD_ERRORS = (ImportError, OSError, ValueError, LookupError, TypeError, AttributeError)


def load_tokenizer(directory: str | os.PathLike, name: str | os.PathLike | None = None, **options):
    """The tokenizer of a local directory.

    - `name`: the directory's name in messages, if it is a local copy.
    - `options`: of transformers' `AutoTokenizer.from_pretrained`.

    Raises UserError with the file's name for JSON files of the model that are broken, and for other damage.
    """
    from transformers import AutoTokenizer  # imported here because the import is slow

    check_json_files(directory, name)
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, **options)
    except LOAD_ERRORS as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"tokenizer {str(name or directory)!r}: cannot be loaded ({text}); copy its files again"
        ) from None


def check_json_files(directory: str | os.PathLike, name: str | os.PathLike | None = None) -> None:
    """Raise UserError, with the file's name, for a broken config.json, generation_config.json or tokenizer file."""
    for file in ("config.json", *TOKENIZER_FILES):
        if file.endswith(".json") and (Path(directory) / file).is_file():
            place = f"{name or directory}/{file}"
            content = read_json(Path(directory) / file, place)
            if file == "tokenizer.json":
                _check_tokenizer_json(content, place)


def _check_tokenizer_json(content: dict, place: str) -> None:
    """Raise UserError unless the file has the parts of a tokenizer."""
    model, added = content.get("model"), content.get("added_tokens")
    has_model = isinstance(model, dict) and isinstance(model.get("vocab"), (dict, list))
    has_tokens = isinstance(added, list) and all(isinstance(token, dict) and "content" in token for token in added)
    if not has_model or not has_tokens:
        raise UserError(f"{place}: is not a tokenizer (no model with a vocab, or no added_tokens); copy it again")
