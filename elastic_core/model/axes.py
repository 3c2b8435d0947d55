"""The elastic axes: their names in unit keys, and the fields of a Submodel that have their sizes."""

AXES = (
    *("hidden", "ffn", "mamba_heads", "mamba_channels", "attention_heads"),
    *("experts", "expert_ffn", "shared_ffn", "depth"),
)

# Submodel field → axis in unit keys. The architecture's `units` decides which layers have this axis.
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
PER_LAYER = ("intermediate_size", "mamba_num_heads", "num_attention_heads")  # may differ between layers
TITLES = {  # of the fields, for people
    "hidden_size": "hidden",
    "intermediate_size": "MLP",
    "mamba_num_heads": "Mamba heads",
    "mamba_head_dim": "Mamba head dim",
    "num_attention_heads": "attention heads",
    "num_experts": "experts",
    "moe_intermediate_size": "expert",
    "moe_shared_expert_intermediate_size": "shared expert",
}
