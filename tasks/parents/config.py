"""Reads or makes the parent's configuration. Needs no weights."""

from __future__ import annotations

from transformers import NemotronHConfig, PreTrainedConfig

from elastic_core.errors import named
from elastic_core.model import architectures, hf
from tasks.parents import gguf, hub
from tasks.settings.local_checks import is_package
from tasks.settings.parts.parent import Parent, ParentModel
from tasks.settings.paths import is_hub_name


def read_parent_config(parent: Parent, vocab_size: int) -> PreTrainedConfig:
    """The configuration of section `parent`: of an existing parent (see `read_config`), or of `model`; as it is used.

    `vocab_size` applies to `model` only.
    """
    if parent.path is None:
        return as_used(new_config(parent.model, vocab_size), parent)
    return as_used(read_config(parent.path), parent)


def read_config(path: str) -> PreTrainedConfig:
    """The configuration of an existing parent: of a directory, URL, package or model of the hub.

    Raises UserError for an unknown or unsupported architecture and for a model that the hub does not give, ConfigError
    for a package that is not installed, and StorageError for a URL that cannot be read.
    """
    if is_package(path):
        return gguf.read_config(path)
    if not is_hub_name(path):
        return hf.read_config(path)
    with named(path):
        return hf.read_config(hub.fetch(path, "config.json"))


def as_used(config: PreTrainedConfig, parent: Parent) -> PreTrainedConfig:
    """A parent's configuration with the section's `rope_scaling`, `clamp_time_step` and `untie_head`.

    Raises UserError for what the architecture does not have.
    """
    config = architectures.with_rope_scaling(config, parent.rope_scaling)
    if parent.clamp_time_step:
        config = architectures.with_clamped_time_step(config)
    return architectures.with_own_head(config) if parent.untie_head else config


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
