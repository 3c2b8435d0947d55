"""The elastic axes: their names in unit keys, and the fields of a Submodel that hold their sizes."""

AXES = (
    *("hidden", "ffn", "mamba_heads", "mamba_channels", "attention_heads"),
    *("experts", "expert_ffn", "shared_ffn", "depth"),
)

# Submodel field → the axis of its unit keys; which layers have such a key is for the family's table to say.
WIDTHS = {
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "mamba_num_heads": "mamba_heads",
    "mamba_head_dim": "mamba_channels",
    "num_attention_heads": "attention_heads",
    "num_experts": "experts",
    "moe_intermediate_size": "expert_ffn",
    "moe_shared_expert_intermediate_size": "shared_ffn",
}
FIELDS = {axis: field for field, axis in WIDTHS.items()}
EXPERTS = ("num_experts", "moe_intermediate_size", "moe_shared_expert_intermediate_size")  # one size for all layers
PER_LAYER = ("intermediate_size", "mamba_num_heads", "num_attention_heads")
