"""A tiny model that answers test items."""

import torch
from transformers import NemotronHConfig, NemotronHForCausalLM


def tiny_model(tokenizer):
    torch.manual_seed(0)
    settings = NemotronHConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        layers_block_type=["mamba", "attention", "mlp"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=16,
        mamba_num_heads=2,
        mamba_head_dim=8,
        n_groups=1,
        ssm_state_size=8,
        chunk_size=16,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return NemotronHForCausalLM(settings).eval()
