"""Loads the parent's tokenizer."""

import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from elastic_core.data.tokenizer import load_tokenizer as load_local_tokenizer
from elastic_core.errors import UserError, named
from elastic_core.io import storage
from elastic_core.io.directory_transfer import local_files
from elastic_core.io.tokenizer_files import is_tokenizer_file
from tasks.parents import hub
from tasks.parents.gguf_file import Gguf
from tasks.settings.local_checks import find_package_file, is_package
from tasks.settings.paths import is_hub_name


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a local directory, a package, a URL or a model of the hub.

    Raises UserError if there is no tokenizer, if it is not a fast one, or if it has no eos token. Raises StorageError
    for a URL that cannot be read.
    """
    if is_package(source):
        with tempfile.TemporaryDirectory(prefix="elastic-") as written:
            Gguf(find_package_file(str(source))).tokenizer().save_pretrained(written)
            return load_tokenizer(written)
    if is_hub_name(source):
        with named(source):
            return load_tokenizer(hub.fetch(source, *hub.SMALL))
    if not storage.is_url(source) and not Path(source).is_dir():
        raise UserError(f"tokenizer {str(source)!r}: no such directory; parent.path is a model's directory, or null")
    with local_files(source, is_tokenizer_file) as local:
        tokenizer = load_local_tokenizer(local, source)
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {str(source)!r}: needs a fast tokenizer (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {str(source)!r}: has no eos token; set eos_token in tokenizer_config.json")
    return tokenizer
