"""Reads a Llama from a GGUF file, the format of llama.cpp, in the form that transformers uses.

transformers can load such a file but cannot save it again, and the tokenizer that it makes does not split digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from elastic_core.errors import UserError

TENSOR_NAMES = {  # llama.cpp's name → transformers' name
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
CONTROL_TOKEN = 3  # llama.cpp's type of special tokens


class Gguf:
    """One GGUF file that holds a Llama. Methods raise UserError for what a plain Llama directory cannot express."""

    def __init__(self, file: Path):
        from gguf import GGUFReader

        self.file, self.reader = file, GGUFReader(file)
        self._expect("general.architecture", "llama")

    def value(self, key: str, default=None):
        """The content of a field. If it is missing: `default`, or UserError without a default."""
        field = self.reader.fields.get(key)
        if field is None and default is None:
            raise UserError(f"{self.file}: has no {key}; expected a Llama that llama.cpp converted")
        return default if field is None else field.contents()

    def _expect(self, key: str, allowed: str) -> None:
        if self.value(key) != allowed:
            raise UserError(f"{self.file}: {key} is {self.value(key)!r}; allowed: {allowed!r}")

    def config(self) -> PreTrainedConfig:
        """The configuration in transformers' form. Raises UserError for options that are not supported here."""
        hidden_size, num_heads = self.value("llama.embedding_length"), self.value("llama.attention.head_count")
        for key in self.reader.fields:
            if key.startswith("llama.rope.scaling"):
                raise UserError(f"{self.file}: has {key}; allowed: rotary positions without scaling")
        head_dim = self.value("llama.attention.key_length", hidden_size // num_heads)
        if self.value("llama.rope.dimension_count", head_dim) != head_dim:
            raise UserError(f"{self.file}: llama.rope.dimension_count differs from the heads' {head_dim}")
        config = transformers.LlamaConfig(  # its import takes a second
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
        return config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """transformers' name → shape, in the order of the file."""
        return {self._name(t.name): tuple(int(n) for n in reversed(t.shape)) for t in self.reader.tensors}

    def tensors(self, config: PreTrainedConfig) -> Iterator[tuple[str, Tensor]]:
        """Yield (transformers' name, tensor in float32), one by one. Rows are in transformers' order."""
        from gguf import dequantize

        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for stored in self.reader.tensors:
            name = self._name(stored.name)
            tensor = torch.tensor(dequantize(stored.data, stored.tensor_type))
            for part, number in heads.items():
                # RoPE rotates pairs of channels. llama.cpp stores a pair side by side, transformers half a head apart.
                if f"{part}." in name:
                    tensor = tensor.unflatten(0, (number, -1, 2)).transpose(1, 2).flatten(0, 2)
            yield name, tensor.contiguous()

    def _name(self, name: str) -> str:
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
        if found is None or found[2] not in TENSOR_NAMES:
            raise UserError(f"{self.file}: holds the tensor {name!r}; allowed: the weights of a Llama without biases")
        prefix = "" if found[1] is None else f"model.layers.{found[1]}."
        return f"{prefix}{TENSOR_NAMES[found[2]]}.weight"

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The byte-level BPE. It splits digits, as SmolLM2's tokenizer does; the file only names this rule ("smollm").

        Raises UserError for every other kind of tokenizer.
        """
        self._expect("tokenizer.ggml.model", "gpt2")
        self._expect("tokenizer.ggml.pre", "smollm")
        tokens, types = self.value("tokenizer.ggml.tokens"), self.value("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ", 1)) for merge in self.value("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
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
