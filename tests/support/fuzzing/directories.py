"""Small valid model directories of every architecture, to be broken."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, NemotronHConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from elastic_core.cost.metrics import PARAMETERS
from elastic_core.export import elastic_checkpoint
from elastic_core.model import architectures, hf
from elastic_core.model.norm_gains import BudgetGains
from elastic_core.model.submodel import Submodel
from elastic_core.search.selection import Member
from tests.support.models.parents import random_elastic

SIZES = {
    "vocab_size": 9,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 6,
}
LAYERS = {"num_hidden_layers": 2, "max_position_embeddings": 64}
SCALED = {"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 16}
MAMBA = {"ssm_state_size": 4, "mamba_num_heads": 2, "mamba_head_dim": 4, "n_groups": 1, "chunk_size": 8}
EXPERTS = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    **{"moe_intermediate_size": 4, "moe_shared_expert_intermediate_size": 4},
}
PROVENANCE = {
    "stages": [
        {
            **{"stage": "train_short", "key": "0123", "commit": None, "clean": False, "parameters": {"seed": 0}},
            **{
                "libraries": {"torch": "2"},
                "files": {"a": "b"},
                "fingerprints": {},
                "started": "2026-11-29T20:00:00+00:00",
            },
            **{"seconds": 1.5, "device": "cpu", "tokens": 9, "continues": {"run": "old", "changed": ["a"]}},
        }
    ]
}
CONFIGS = {
    "nemotron_h": lambda: NemotronHConfig(**SIZES, **MAMBA, **EXPERTS, layers_block_type=["mamba", "moe", "attention"]),
    "llama": lambda: LlamaConfig(**SIZES, **LAYERS, rope_parameters=SCALED),
    "qwen2": lambda: Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}, **LAYERS),
    "qwen3": lambda: Qwen3Config(**SIZES, **LAYERS, tie_word_embeddings=True),
}


def write_parent(directory: Path, architecture: str) -> Path:
    """A random parent with a tokenizer."""
    random_elastic(0, CONFIGS[architecture]()).save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(["<end>", *"abcd"])}, "<end>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": 0, "max_new_tokens": 2}')
    return directory


def write_family(directory: Path, architecture: str, metric=PARAMETERS) -> Path:
    """The same with budgets: an elastic checkpoint with two members and one between them, and its provenance."""
    write_parent(directory, architecture)
    config = hf.read_config(directory)
    members = {"full": Member(1.0, Submodel()), "small": Member(0.5, Submodel(hidden_size=4, kept_layers=(0, 1)))}
    elastic_checkpoint.write(directory, config, members, [Submodel(hidden_size=6, kept_layers=(0, 1))], metric)
    (directory / "provenance.json").write_text(json.dumps(PROVENANCE))
    return directory


def add_norm_gains(directory: Path) -> Path:
    """Give the family of `write_family` trained gains of the norms, which elastic.json announces."""
    config, file = hf.read_config(directory), directory / elastic_checkpoint.FILE
    generator, small = torch.Generator().manual_seed(0), Submodel(hidden_size=4, kept_layers=(0, 1)).resolve(config)
    middle = Submodel(hidden_size=6, kept_layers=(0, 1)).resolve(config)
    names = architectures.norm_names(config)
    gains = {
        budget: {name: 1 + 0.1 * torch.randn(config.hidden_size, generator=generator) for name in names}
        for budget in ("middle", "small")
    }
    BudgetGains({"middle": middle, "small": small}, gains).write(directory)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"private_norms": True}))
    return directory


def copy(directory: Path, target: Path) -> Path:
    """A fresh copy at `target`."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(directory, target))


@contextlib.contextmanager
def restored(file: Path) -> Iterator[None]:
    """Give a file its content back at the end of the block, in which tests break it."""
    valid = file.read_bytes()
    try:
        yield
    finally:
        file.write_bytes(valid)
