"""The parent's configuration, read without any weights."""

from __future__ import annotations

from transformers import NemotronHConfig, PreTrainedConfig

from elastic_core.model import hf
from tasks.parents import gguf
from tasks.settings.local_checks import is_package
from tasks.settings.schema import ParentModel


def read_parent_config(path: str | None, model: ParentModel | None, vocab_size: int) -> PreTrainedConfig:
    """The configuration at `path` (a directory, URL or package), or, where it is None, of `model`.

    Raises UserError for a model of unknown or unsupported architecture.
    """
    if path is None:
        return new_config(model, vocab_size)
    return gguf.read_config(path) if is_package(path) else hf.read_config(path)


def new_config(model: ParentModel, vocab_size: int, **special_tokens: int) -> NemotronHConfig:
    """The transformers configuration of a parent that is to be trained."""
    values = vars(model).copy()
    pattern = values.pop("pattern")
    config = NemotronHConfig(
        vocab_size=vocab_size, layers_block_type=NemotronHConfig._pattern_to_list(pattern), **values, **special_tokens
    )
    return hf.check_config(config, "params.yaml: parent.model")
