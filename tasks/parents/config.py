"""Reads or makes the parent's configuration. Needs no weights."""

from __future__ import annotations

from transformers import NemotronHConfig, PreTrainedConfig

from elastic_core.model import hf
from tasks.parents import gguf
from tasks.settings.local_checks import is_package
from tasks.settings.sections import ParentModel


def read_parent_config(path: str | None, model: ParentModel | None, vocab_size: int) -> PreTrainedConfig:
    """The configuration at `path`: a directory, a URL or a package. If `path` is None, the configuration of `model`.

    `vocab_size` applies to `model` only. Raises UserError for an unknown or unsupported architecture, ConfigError for
    a package that is not installed, and StorageError for a URL that cannot be read.
    """
    if path is None:
        return new_config(model, vocab_size)
    return gguf.read_config(path) if is_package(path) else hf.read_config(path)


def new_config(model: ParentModel, vocab_size: int, **special_tokens: int) -> NemotronHConfig:
    """The transformers configuration of a parent that will be trained here. Raises UserError for sizes that do not fit.

    special_tokens: ids such as ``eos_token_id``.
    """
    values = vars(model).copy()
    pattern = values.pop("pattern")
    config = NemotronHConfig(
        vocab_size=vocab_size, layers_block_type=NemotronHConfig._pattern_to_list(pattern), **values, **special_tokens
    )
    return hf.check_config(config, "params.yaml: parent.model")
