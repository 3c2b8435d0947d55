"""A random family of three budgets with a tokenizer and a chat template, small enough to be served in a test."""

import dataclasses
from pathlib import Path

from transformers import LlamaConfig, NemotronHConfig

from elastic_core import Submodel
from elastic_core.export import elastic_checkpoint
from elastic_core.model import hf
from elastic_core.search.selection import Member
from tests.support.models.chat import CHATML, chat_tokenizer
from tests.support.models.parents import save_random_parent

SMALL = {
    "llama": {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2, "kept_layers": (0, 2)},
    "nemotron_h": {
        **{"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2, "mamba_num_heads": 2},
        **{"mamba_head_dim": 6, "kept_layers": (0, 1, 2, 4)},
    },
}


def served_config(architecture: str, vocab_size: int, pattern: str = "M-*M-"):
    """A configuration. With biases in Mamba layers, so that padded rows would not be what they are alone."""
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "max_position_embeddings": 512}
    shape = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": vocab_size, "head_dim": 8, **ids}
    if architecture == "llama":
        return LlamaConfig(**shape, num_hidden_layers=3)
    return NemotronHConfig(
        **shape, layers_block_type=NemotronHConfig._pattern_to_list(pattern), ssm_state_size=8, mamba_num_heads=4,
        mamba_head_dim=8, n_groups=2, chunk_size=16, use_bias=True, time_step_min=1e-30,
    )  # fmt: skip


def write_served_family(directory: Path, architecture: str = "nemotron_h", pattern: str = "M-*M-") -> None:
    """Budgets full, medium and small, and a member in between that has the hidden size of small."""
    tokenizer = chat_tokenizer(CHATML)
    save_random_parent(directory, 1, served_config(architecture, len(tokenizer), pattern))
    tokenizer.save_pretrained(directory)
    config = hf.read_config(directory)
    values = {name: size for name, size in SMALL[architecture].items() if name in ("kept_layers", "hidden_size")}
    values |= {} if pattern == "M-*M-" else {"kept_layers": (0, 1, 2)}
    small = Submodel(**(SMALL[architecture] | values)).resolve(config)
    medium = dataclasses.replace(small, hidden_size=24, intermediate_size=None).resolve(config)
    between = dataclasses.replace(medium, hidden_size=20).resolve(config)
    budgets = {"full": Submodel().resolve(config), "medium": medium, "small": small}
    elastic_checkpoint.write(directory, config, {name: Member(1.0, s) for name, s in budgets.items()}, [between])
