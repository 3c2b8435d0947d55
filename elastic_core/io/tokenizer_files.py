"""The names of a tokenizer's files in a model directory, and how to copy them."""

import os
import shutil
from pathlib import Path

TOKENIZERS = ("tokenizer.json", "vocab.json")  # transformers can make a fast tokenizer from either file
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
MORE_TEMPLATES = "additional_chat_templates"  # a directory of templates with a name, such as tool_use.jinja
# Where to get a chat template, in messages.
ADVICE = "copy chat_template.jinja (older models: tokenizer_config.json) from the instruct model of the same family"


def is_tokenizer_file(name: str) -> bool:
    """Whether the tokenizer of a model directory depends on a file; `name` is relative to the directory.

    config.json is one: it says of which class the tokenizer is.
    """
    directory, _, last = name.rpartition("/")
    is_template = directory == MORE_TEMPLATES and last.endswith(".jinja")
    return is_template or name == "config.json" or name in TOKENIZER_FILES


def has_chat_template(directory: Path) -> bool:
    """Whether the tokenizer files of a local directory have a chat template. Reads little."""
    config = directory / "tokenizer_config.json"
    is_inside = config.is_file() and b'"chat_template"' in config.read_bytes()
    return is_inside or (directory / "chat_template.jinja").is_file() or (directory / MORE_TEMPLATES).is_dir()


def copy_tokenizer(source: str | os.PathLike, directory: Path) -> None:
    """Copy tokenizer files, chat templates and generation_config.json to `directory`, as far as `source` has them."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, directory / name)
    for template in sorted((Path(source) / MORE_TEMPLATES).glob("*.jinja")):
        (directory / MORE_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(template, directory / MORE_TEMPLATES / template.name)
