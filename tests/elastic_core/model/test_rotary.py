"""Rotary positions: frequencies, cosines and sines, and the rotation, all equal to those of transformers to the bit."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from elastic_core.model.architectures.rotary import Rotary, rotary_frequencies, rotate

ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        **{"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [2, 10])
@pytest.mark.parametrize("name", ROPES)
def test_rotary_positions_are_those_of_transformers(name, head_dim, dtype, device):
    rope = {"rope_theta": 500.0, **ROPES[name]}
    config = LlamaConfig(head_dim=head_dim, rope_parameters=rope, max_position_embeddings=64)
    reference, length = LlamaRotaryEmbedding(config), 37
    with torch.device(device):  # as models are built
        ours = Rotary(config, head_dim)
        frequencies, scale = rotary_frequencies(config, head_dim)
    assert torch.equal(frequencies, reference.inv_freq) and scale == reference.attention_scaling
    query, key = (torch.randn(2, length, heads, head_dim, dtype=dtype) for heads in (4, 2))
    expected = reference(query, torch.arange(length)[None])
    for found, wanted in zip(ours(query), expected, strict=True):
        assert found.dtype == dtype and torch.equal(found, wanted[0])
    wanted = apply_rotary_pos_emb(query, key, *(part[0] for part in expected), unsqueeze_dim=1)
    for found, wanted_heads in zip(rotate((query, key), *ours(query)), wanted, strict=True):
        assert torch.equal(found, wanted_heads)
