"""The architecture `nemotron_h`: each layer is one mixer, which is Mamba-2, grouped-query attention, an MLP or an MoE.

architectures/__init__.py explains what this module has to define.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

import elastic_core.model.architectures.nemotron_h_ffn as ffn
import elastic_core.model.architectures.nemotron_h_mamba as mamba
from elastic_core.errors import UserError
from elastic_core.model.dims import Fixed, Layout, Product, Units
from elastic_core.model.documents import Documents
from elastic_core.model.layers import Norm, add_parameters, causal_attention, part_of
from elastic_core.model.ops import ssd
from elastic_core.model.ops.activation import activation_requirement
from elastic_core.model.ops.flops import Flops, attention_flops, scan_flops
from elastic_core.model.slicing import Slice

MODELS = {"nemotron_h": ("NemotronHConfig", "NemotronHForCausalLM")}
EMBEDDINGS, FINAL_NORM = "embeddings", "norm_f"
WIDE = (ffn.CORRECTION,)
WIDE_IN_FILES = (*WIDE, ".A_log", ".D", ".dt_bias")
MODELING_FILE = "modeling_elastic_nemotron_h.py"
REMOTE_CLASSES = ("ElasticNemotronHConfig", "ElasticNemotronHForCausalLM")
MOST_CHUNK = 1 << 11  # tokens; transformers computes with matrices of chunk × chunk for every head
CHARACTERS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-", "moe": "E"}


def requirements(config) -> list[tuple[bool, str]]:
    """Conditions on a configuration, each as (holds, message if it does not hold)."""
    return [
        *(ffn.moe_requirements(config) if "E" in pattern(config) else []),
        (not config.tie_word_embeddings, "tie_word_embeddings=true; transformers keeps nemotron_h heads untied"),
        (
            config.mamba_num_heads % config.n_groups == 0,
            f"mamba_num_heads={config.mamba_num_heads} is not a multiple of n_groups={config.n_groups}",
        ),
        (
            config.num_attention_heads % config.num_key_value_heads == 0,
            f"num_attention_heads={config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={config.num_key_value_heads}",
        ),
        mamba.limit_requirement(config),
        activation_requirement("mlp_hidden_act", config.mlp_hidden_act),
        (config.mamba_hidden_act == "silu", f"mamba_hidden_act={config.mamba_hidden_act!r}; allowed: 'silu'"),
        (1 <= config.chunk_size <= MOST_CHUNK, f"chunk_size={config.chunk_size}; allowed: 1 to {MOST_CHUNK:,}"),
    ]


def norm_eps(config) -> float:
    """The epsilon of the norms."""
    return config.layer_norm_epsilon


def max_positions(config) -> int | None:
    """None: no layer has position embeddings, so no text is too long. max_position_embeddings has no effect."""
    return None


def scale_positions(config, scaling: Mapping) -> None:
    """Raise UserError, because there are no rotary positions."""
    raise UserError("rope_scaling: a nemotron_h has no rotary positions; remove it, longer texts need no scaling")


def clamp_time_step(config) -> None:
    """Limit the time step of a configuration as transformers does, in place: `time_step_min` is the smallest."""
    config.time_step_limit = mamba.clamped_limit(config)


def pattern(config) -> str:
    """One character per layer, for example ``M-M*-``."""
    return pattern_of(config.layers_block_type)


def pattern_of(block_types: Iterable[str]) -> str:
    """The pattern of a list of layer types."""
    return "".join(CHARACTERS[block_type] for block_type in block_types)


def layers_of(config, character: str) -> list[int]:
    """The indices of the parent's layers with this character."""
    return [i for i, c in enumerate(pattern(config)) if c == character]


# Names and sizes


def units(config) -> dict[str, Units]:
    """Every unit key with its full size and groups."""
    found = {"hidden": Units("hidden", config.hidden_size)}
    for i, character in enumerate(pattern(config)):
        if character == "M":
            found[f"mamba_heads.{i}"] = Units(f"mamba_heads.{i}", config.mamba_num_heads, groups=config.n_groups)
            found[f"mamba_channels.{i}"] = Units(f"mamba_channels.{i}", config.mamba_head_dim)
        elif character == "*":
            key, groups = f"attention_heads.{i}", config.num_key_value_heads
            found[key] = Units(key, config.num_attention_heads, groups)
        elif character == "-":
            found[f"ffn.{i}"] = Units(f"ffn.{i}", config.intermediate_size)
        elif character == "E":
            found |= {width.key: width for width in ffn.moe_units(config, i)}
    return found


def parameter_layout(config) -> Layout:
    """The name and dimensions of every parameter, in file order.

    Names are those of `transformers.NemotronHForCausalLM.state_dict()`.
    """
    keys, vocab = units(config), Fixed(config.vocab_size)
    hidden = keys["hidden"]
    mixers = {"M": mamba.mamba_layout, "*": _attention_layout, "-": _mlp_layout, "E": ffn.moe_layout}
    layout: Layout = {"model.embeddings.weight": (vocab, hidden)}
    for i, character in enumerate(pattern(config)):
        layout[f"model.layers.{i}.norm.weight"] = (hidden,)
        for name, dims in mixers[character](config, i, keys).items():
            layout[f"model.layers.{i}.mixer.{name}"] = dims
    layout["model.norm_f.weight"] = (hidden,)
    layout["lm_head.weight"] = (vocab, hidden)
    return layout


def _attention_layout(config, i: int, keys: dict[str, Units]) -> Layout:
    head_dim = Fixed(config.head_dim)
    hidden, heads = keys["hidden"], keys[f"attention_heads.{i}"]
    query, key_value = Product((heads, head_dim)), Product((Fixed(config.num_key_value_heads), head_dim))
    return {
        "q_proj.weight": (query, hidden),
        "k_proj.weight": (key_value, hidden),
        "v_proj.weight": (key_value, hidden),
        "o_proj.weight": (hidden, query),
    }


def _mlp_layout(config, i: int, keys: dict[str, Units]) -> Layout:
    return ffn.mlp_layout(config, keys["hidden"], keys[f"ffn.{i}"])


def norm_before(name: str) -> str:
    """The norm whose output the matrix `name` of a layer reads."""
    return name.partition(".mixer.")[0] + ".norm.weight"


def kept_state(config) -> dict[str, Layout]:
    """What layers keep of a text. Each entry has the name and the dimensions of the parameter that computes it."""
    kept: dict[str, Layout] = {"kv_cache": {}, "ssm_state": {}, "conv_state": {}}
    for name, dims in parameter_layout(config).items():
        if name.endswith((".k_proj.weight", ".v_proj.weight")):
            kept["kv_cache"][name] = (dims[0],)
        elif name.endswith(".conv1d.weight"):  # the last inputs, as many tokens as the kernel is long
            kept["conv_state"][name] = (dims[0], dims[-1])
        elif name.endswith(".mixer.out_proj.weight"):  # one state for every inner channel
            kept["ssm_state"][name] = (dims[1], Fixed(config.ssm_state_size))
    return kept


# Cost in training


def mixing_flops(
    config, sizes: Mapping[str, int], kept: Iterable[int], length: int, pairs: float, on_gpu: bool
) -> Flops:
    """Operations on one sequence in the kept layers that multiply no weights: attention and the scan."""
    total, types = Flops(), pattern(config)
    for i in kept:
        if types[i] == "*":
            total += attention_flops(pairs, sizes[f"attention_heads.{i}"], config.head_dim)
        elif types[i] == "M":
            heads, channels = sizes[f"mamba_heads.{i}"], sizes[f"mamba_channels.{i}"]
            total += scan_flops(length, heads, channels, config.n_groups, config.ssm_state_size, on_gpu)
    return total


def scan_block(config, layer: int, sequences: int) -> int | None:
    """The positions (a multiple of the chunk) that a layer's scan processes at one time on a CPU; None without scan."""
    if pattern(config)[layer] != "M":
        return None
    return ssd.CHUNK * max(1, ssd.BLOCK // (sequences * config.mamba_num_heads * ssd.CHUNK**2))


def set_scan_kernel(block: nn.Module, find: Callable) -> None:
    """Let a layer with a scan find its kernel by `find`, in the place of `kernels.layer_kernel`."""
    block.mixer.find_kernel = find


# Files


def canonical_name(name: str) -> str | None:
    """The parameter's name for a tensor in a file, where the trunk is called ``backbone`` or ``model``.

    None for the heads of multi-token prediction, which are not used.
    """
    if name.startswith("mtp."):
        return None
    return "model." + name.removeprefix("backbone.") if name.startswith("backbone.") else name


def disk_name(name: str) -> str:
    """The name in files that transformers and vLLM write and read."""
    return "backbone." + name.removeprefix("model.") if name.startswith("model.") else name


def file_values(values: dict) -> dict:
    """The values of config.json, as the readers of the files understand them.

    All versions of transformers, vLLM, SGLang, MLX and llama.cpp read the layers from ``hybrid_override_pattern``. The
    names in ``layers_block_type`` belong to some versions of transformers only. llama.cpp takes a model with keys of
    experts for one with experts. The heads of multi-token prediction are not written, so their keys are not either.
    """
    types = values["layers_block_type"]
    left_out = {"layers_block_type", "num_nextn_predict_layers", "mtp_layers_block_type"}
    if "moe" not in types:
        left_out.update(ffn.MOE_KEYS)
    kept = {name: value for name, value in values.items() if name not in left_out}
    kept = mamba.with_time_step_limit(kept)
    return kept | {"hybrid_override_pattern": pattern_of(types), "num_hidden_layers": len(types)}


def size_problem(config, hidden_size: int, num_attention_heads: int) -> str | None:
    """Why transformers cannot load these sizes: always None, it loads all."""
    return None


def can_cache(config, kept_layers: Iterable[int]) -> bool:
    """Whether transformers can decode with a cache: it needs an attention layer to know the length of the cache."""
    return "*" in (pattern(config)[i] for i in kept_layers)


def pads_exactly(config) -> bool:
    """Whether transformers computes left-padded rows as it computes each row alone.

    It sets the inputs of Mamba layers to zero at padding. A bias after that is not zero, and the convolution mixes it
    into the first tokens.
    """
    return not (config.use_bias and "M" in pattern(config))


def config_changes(config, kept_layers: Sequence[int], widths: dict[str, int | list[int]]) -> dict:
    """The values in a submodel's configuration that differ from the parent's. A list has one entry per kept layer."""
    types = [config.layers_block_type[i] for i in kept_layers]
    widths = {"n_routed_experts" if name == "num_experts" else name: size for name, size in widths.items()}
    return widths | {"head_dim": config.head_dim, "layers_block_type": types}


def finish(model: nn.Module, device: torch.device) -> None:
    """Add everything except parameters to a transformers model that was built without memory: nothing here."""


def copy_state(config, layer: int, state, within: Callable[[str], Tensor], cache: Cache, number: int) -> None:
    """Copy the part of a layer's `state` that a smaller submodel has into its cache, as layer `number`.

    `within(name)` has the indices of the smaller submodel's rows among the larger one's rows, for a parameter `name`
    of the layer.
    """
    character = pattern(config)[layer]
    if character == "*":  # copied whole, because every submodel has all KV heads
        cache.update(state.keys, state.values, number)
    elif character == "M":
        conv, recurrent = state.conv_states[0], state.recurrent_states[0]  # (B, C, K), (B, heads, channels, N)
        heads = within("mixer.A_log")
        channels = len(within("mixer.norm.weight")) // len(heads)
        cache.update_conv_state(conv.index_select(1, within("mixer.conv1d.weight").to(conv.device)), number)
        recurrent = recurrent.index_select(1, heads.to(recurrent.device))[:, :, :channels]
        cache.update_recurrent_state(recurrent.contiguous(), layer_idx=number)


# Layers


class Attention(nn.Module):
    """Causal grouped-query attention without positions. Every KV group keeps the same number of query heads."""

    def __init__(self, config, layer: int, layout: Layout):
        super().__init__()
        self.layout, self.layer, self.units = layout, layer, f"attention_heads.{layer}"
        self.head_dim, self.num_key_value_heads = config.head_dim, config.num_key_value_heads
        add_parameters(self, layout)

    def forward(self, x: Tensor, sliced: Slice, documents: Documents | None = None) -> Tensor:
        num_heads, num_kv = sliced.sizes[self.units], self.num_key_value_heads
        query, key, value = (
            F.linear(x, sliced.weight(self, self.layout, f"{name}_proj.weight")).unflatten(-1, (heads, self.head_dim))
            for name, heads in (("q", num_heads), ("k", num_kv), ("v", num_kv))
        )
        sliced.observe(self.units, query)
        y = causal_attention(query, key, value, documents)
        weight = sliced.writing_weight(self, self.layout, "o_proj.weight", self.layer, self.units)
        sliced.observe(self.units, y, weight)
        return F.linear(y, weight)


MIXERS = {"M": mamba.Mamba, "*": Attention, "-": ffn.MLP, "E": ffn.MoE}


class Block(nn.Module):
    """x + mixer(norm(x)). The mixer multiplies its output by the gates."""

    def __init__(self, config, layer: int, layout: Layout):
        super().__init__()
        self.norm = Norm(f"model.layers.{layer}.norm.weight", norm_eps(config), part_of(layout, "norm"))
        self.mixer = MIXERS[pattern(config)[layer]](config, layer, part_of(layout, "mixer"))

    def forward(self, x: Tensor, sliced: Slice, documents: Documents | None = None) -> Tensor:
        return x + self.mixer(self.norm(x, sliced), sliced, documents)
