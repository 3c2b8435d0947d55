"""The small files beside the weights of a model directory, tokenizer first: their names, and how to copy them.

`copy_tokenizer` writes tokenizer_config.json as older readers understand it. What neither it nor `copy_companions`
copies is in `left_out`.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from elastic_core.io.json_files import read_json

TOKENIZERS = ("tokenizer.json", "vocab.json")  # transformers can make a fast tokenizer from either file
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
MORE_TEMPLATES = "additional_chat_templates"  # a directory of templates with a name, such as tool_use.jinja
LEGAL = re.compile(r"(licen[cs]e|notice|copying|copyright)([-_. ].*)?", re.IGNORECASE)
PARENT_CARD = "parent_card.json"  # the parent's name and licence, for the model cards of what is made of it
PARSER = re.compile(r"\w*parser\w*\.py")  # of answers and tool calls, for servers: vLLM loads such a file by its name
# Files that every export writes itself, or that only the loading of the parent needs.
REPLACED = re.compile(
    r"config\.json|README\.md|provenance\.json|elastic\.json|(modeling|configuration)_\w+\.py|"
    r".*\.safetensors(\.index\.json)?|pytorch_model.*"
)
# Where to get a chat template, in messages.
ADVICE = "copy chat_template.jinja (older models: tokenizer_config.json) from the instruct model of the same family"


def is_tokenizer_file(name: str) -> bool:
    """Whether the tokenizer of a model directory depends on a file; `name` is relative to the directory.

    config.json is one: it says of which class the tokenizer is.
    """
    directory, _, last = name.rpartition("/")
    is_template = directory == MORE_TEMPLATES and last.endswith(".jinja")
    return is_template or name == "config.json" or name in TOKENIZER_FILES


def is_companion(name: str) -> bool:
    """Whether a file belongs to every model that is made of a parent: its licence, or a parser of its answers."""
    return name == PARENT_CARD or LEGAL.fullmatch(name) is not None or PARSER.fullmatch(name) is not None


def left_out(names: Iterable[str]) -> list[str]:
    """Those of a parent's files that a model which is made of it neither has as a copy nor writes itself.

    Names are relative to the parent's directory. Hidden files are not listed.
    """
    return sorted(
        name
        for name in names
        if not name.startswith(".")
        and not (is_tokenizer_file(name) or is_companion(name) or REPLACED.fullmatch(name.rpartition("/")[2]))
    )


def has_chat_template(directory: Path) -> bool:
    """Whether the tokenizer files of a local directory have a chat template. Reads little."""
    config = directory / TOKENIZER_CONFIG
    is_inside = config.is_file() and b'"chat_template"' in config.read_bytes()
    return is_inside or (directory / "chat_template.jinja").is_file() or (directory / MORE_TEMPLATES).is_dir()


def copy_tokenizer(source: str | os.PathLike, directory: Path) -> None:
    """Copy tokenizer files, chat templates and generation_config.json to `directory`, as far as `source` has them.

    tokenizer_config.json is written anew where an older reader would not understand it (see `readable`).
    """
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, directory / name)
    for template in sorted((Path(source) / MORE_TEMPLATES).glob("*.jinja")):
        (directory / MORE_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(template, directory / MORE_TEMPLATES / template.name)
    if (file := directory / TOKENIZER_CONFIG).is_file():
        values = read_json(file)
        if (changed := readable(values)) != values:
            file.write_text(json.dumps(changed, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: str | os.PathLike, directory: Path) -> None:
    """Copy the files that `is_companion` names to `directory`."""
    for path in sorted(Path(source).iterdir()):
        if path.is_file() and is_companion(path.name):
            shutil.copyfile(path, directory / path.name)


def readable(values: dict) -> dict:
    """The values of tokenizer_config.json as transformers before version 5, and what is built on it, understands them.

    The class ``TokenizersBackend`` and the value `backend` are unknown there, and `extra_special_tokens` is an object.
    Version 5 reads the older names too.
    """
    values = dict(values)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if values.get("backend") == "tokenizers":
        del values["backend"]
    if isinstance(values.get("extra_special_tokens"), list):
        values.setdefault("additional_special_tokens", values.pop("extra_special_tokens"))
    return values
