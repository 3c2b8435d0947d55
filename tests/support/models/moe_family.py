"""A parent with experts that a whole family is made of."""

from transformers import NemotronHConfig

from elastic_core.search.choices import Choices

VALUES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "layers_block_type": NemotronHConfig._pattern_to_list("ME*E"),
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "time_step_min": 1e-30,  # see tests/elastic_core/export/test_extract.py
    "eos_token_id": None,
}


CONFIG = NemotronHConfig(**VALUES)


CHOICES = Choices(
    hidden_size=(32, 24),
    num_experts=(8, 6, 4),
    moe_intermediate_size=(16, 8),
    moe_shared_expert_intermediate_size=(24, 20, 16, 12, 8, 4),
    depth=(4, 3),
)
