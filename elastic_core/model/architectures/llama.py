"""Llama, SmolLM2, Qwen2 and Qwen3: each layer has grouped-query attention with RoPE and a gated MLP.

architectures/__init__.py explains what this module has to define.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from elastic_core.errors import UserError
from elastic_core.model.architectures.rotary import Rotary, rope_requirements, rotate
from elastic_core.model.dims import Fixed, Layout, Product, Units
from elastic_core.model.documents import Documents
from elastic_core.model.layers import Norm, add_parameters, causal_attention, part_of
from elastic_core.model.ops.activation import activation, activation_requirement
from elastic_core.model.ops.flops import Flops, attention_flops, norm_flops
from elastic_core.model.ops.norm import rms_norm
from elastic_core.model.rope_scaling import scaled_rope
from elastic_core.model.slicing import Slice

MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
}
EMBEDDINGS, FINAL_NORM = "embed_tokens", "norm"
NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}  # part of a layer → the norm before it
WIDE, WIDE_IN_FILES = (), ()
MODELING_FILE, REMOTE_CLASSES = None, None  # a model with different widths in its layers must be padded


def norm_eps(config) -> float:
    """The epsilon of the norms."""
    return config.rms_norm_eps


def requirements(config) -> list[tuple[bool, str]]:
    """Conditions on a configuration, each as (holds, message if it does not hold)."""
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    padding, vocab = config.pad_token_id, config.vocab_size
    return [
        (
            config.num_attention_heads % config.num_key_value_heads == 0,
            f"num_attention_heads={config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={config.num_key_value_heads}",
        ),
        *rope_requirements(config, head_dim(config)),
        activation_requirement("hidden_act", config.hidden_act),
        (not sliding, "sliding_attention in layer_types; allowed: 'full_attention' in all layers"),
        (
            padding is None or -vocab <= padding < vocab,
            f"pad_token_id={padding}; allowed: null, or a token below vocab_size={vocab}",
        ),
    ]


def max_positions(config) -> int | None:
    """The longest text for which the rotary positions are made, in tokens."""
    return config.max_position_embeddings


def scale_positions(config, scaling: Mapping) -> None:
    """Scale the rotary positions of a configuration, in place (see rope_scaling.py)."""
    config.rope_parameters, config.max_position_embeddings = scaled_rope(
        config.rope_parameters, config.max_position_embeddings, scaling
    )


def clamp_time_step(config) -> None:
    """Raise UserError, because there is no time step."""
    raise UserError(f"clamp_time_step: a {config.model_type} has no Mamba layers and no time step; set it to false")


def pattern(config) -> str:
    """``L`` for every decoder layer."""
    return "L" * config.num_hidden_layers


# Names and sizes


def head_dim(config) -> int:
    """The size of a head. Qwen2 configurations have no head_dim; there it is hidden_size / num_attention_heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def units(config) -> dict[str, Units]:
    """Every unit key with its full size and groups."""
    found = {"hidden": Units("hidden", config.hidden_size)}
    for i in range(config.num_hidden_layers):
        heads, ffn = f"attention_heads.{i}", f"ffn.{i}"
        found[heads] = Units(heads, config.num_attention_heads, groups=config.num_key_value_heads)
        found[ffn] = Units(ffn, config.intermediate_size)
    return found


def parameter_layout(config) -> Layout:
    """The name and dimensions of every parameter, in file order. With tied embeddings there is no ``lm_head.weight``.

    Names are those of `transformers.LlamaForCausalLM.named_parameters()`.
    """
    keys, vocab = units(config), Fixed(config.vocab_size)
    hidden = keys["hidden"]
    layout: Layout = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config.num_hidden_layers):
        for name, dims in _layer_layout(config, hidden, keys[f"attention_heads.{i}"], keys[f"ffn.{i}"]).items():
            layout[f"model.layers.{i}.{name}"] = dims
    layout["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        layout["lm_head.weight"] = (vocab, hidden)
    return layout


def _layer_layout(config, hidden: Units, heads: Units, ffn: Units) -> Layout:
    # Channels of a head are never sorted or narrowed, because RoPE rotates channel i with channel i + head_dim/2.
    size = Fixed(head_dim(config))
    query, key_value = Product((heads, size)), Product((Fixed(config.num_key_value_heads), size))
    table: Layout = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, query),
        "self_attn.q_norm": (size,),
        "self_attn.k_norm": (size,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    layout: Layout = {}
    for name, dims in table.items():
        if config.model_type == "qwen3" or name not in ("self_attn.q_norm", "self_attn.k_norm"):
            layout[f"{name}.weight"] = dims
        if name.endswith("_proj") and _has_bias(config, name):
            layout[f"{name}.bias"] = dims[:1]
    return layout


def _has_bias(config, name: str) -> bool:
    """Whether a projection has a bias; the same rules as in the classes of transformers."""
    if name.startswith("mlp."):
        return config.model_type == "llama" and config.mlp_bias
    return name != "self_attn.o_proj" if config.model_type == "qwen2" else config.attention_bias


def norm_before(name: str) -> str:
    """The norm whose output the matrix `name` of a layer reads."""
    model, layers, number, part, *_ = name.split(".")
    return f"{model}.{layers}.{number}.{NORMS[part]}.weight"


def kept_state(config) -> dict[str, Layout]:
    """What layers keep of a text: the keys and values of every token."""
    layout = parameter_layout(config)
    names = (name for name in layout if name.endswith((".k_proj.weight", ".v_proj.weight")))
    return {"kv_cache": {name: layout[name][:1] for name in names}}


# Cost in training


def mixing_flops(
    config, sizes: Mapping[str, int], kept: Iterable[int], length: int, pairs: float, on_gpu: bool
) -> Flops:
    """Operations on one sequence in the kept layers that multiply no weights: attention, and Qwen3's norms of heads."""
    total, size = Flops(), head_dim(config)
    for i in kept:
        heads = sizes[f"attention_heads.{i}"]
        total += attention_flops(pairs, heads, size)
        if config.model_type == "qwen3":
            total += norm_flops(length * (heads + config.num_key_value_heads), size)
    return total


def scan_block(config, layer: int, sequences: int) -> int | None:
    """None, because no layer has a scan."""
    return None


def set_scan_kernel(block: nn.Module, find: Callable) -> None:
    """Nothing, because no layer has a scan."""


# Files


def canonical_name(name: str) -> str | None:
    """The parameter's name for a tensor in a file; None for the rotary frequencies, which old files contain."""
    return None if name.endswith("rotary_emb.inv_freq") else name


def disk_name(name: str) -> str:
    """The name in files, which is the parameter's name."""
    return name


def file_values(values: dict) -> dict:
    """The values of config.json, as the readers of the files understand them.

    Older readers do not know ``rope_parameters``. They need ``rope_theta`` and ``rope_scaling`` beside it, or take
    10,000 and no scaling without a word.
    """
    rope = dict(values["rope_parameters"])
    theta = rope.pop("rope_theta")
    return values | {"rope_theta": theta, "rope_scaling": None if rope["rope_type"] == "default" else rope}


def size_problem(config, hidden_size: int, num_attention_heads: int) -> str | None:
    """Why readers of the files cannot load these sizes, or None.

    transformers' Llama requires a hidden size that is a multiple of the number of heads, although it has a head_dim.
    For Qwen2 only transformers reads a head_dim: the others take hidden_size / num_attention_heads.
    """
    problem = f"hidden_size: got {hidden_size} with num_attention_heads {num_attention_heads}; allowed: "
    if config.model_type == "llama" and hidden_size % num_attention_heads != 0:
        return problem + "multiples of the number of heads, otherwise transformers does not load the model"
    if config.model_type == "qwen2" and hidden_size != num_attention_heads * head_dim(config):
        return problem + (
            f"num_attention_heads times the size of a head ({head_dim(config)}), because only transformers reads "
            "another head_dim for qwen2"
        )
    return None


def can_cache(config, kept_layers: Iterable[int]) -> bool:
    """Whether transformers can decode with a cache: always."""
    return True


def pads_exactly(config) -> bool:
    """Whether transformers computes left-padded rows as it computes each row alone: always."""
    return True


def config_changes(config, kept_layers: Sequence[int], widths: dict[str, int]) -> dict:
    """The values in a submodel's configuration that differ from the parent's."""
    changes = widths | {"head_dim": head_dim(config), "num_hidden_layers": len(kept_layers)}
    types = getattr(config, "layer_types", None)
    return changes | ({} if types is None else {"layer_types": [types[i] for i in kept_layers]})


def finish(model: nn.Module, device: torch.device) -> None:
    """Add the rotary frequencies and a tied head to a transformers model that was built without memory."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def copy_state(config, layer: int, state, within: Callable[[str], Tensor], cache: Cache, number: int) -> None:
    """Put a layer's keys and values into a smaller submodel's cache as layer `number`.

    They are copied whole, because every submodel has all KV heads.
    """
    cache.update(state.keys, state.values, number)


# Layers


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE. Every KV group keeps the same number of query heads."""

    def __init__(self, config, layer: int, layout: Layout):
        super().__init__()
        self.layout, self.layer, self.units = layout, layer, f"attention_heads.{layer}"
        self.head_dim, self.num_key_value_heads = head_dim(config), config.num_key_value_heads
        self.eps, self.rotary = config.rms_norm_eps, Rotary(config, self.head_dim)
        add_parameters(self, layout)

    def forward(self, x: Tensor, sliced: Slice, documents: Documents | None = None) -> Tensor:
        query, value = self._project("q", x, sliced), self._project("v", x, sliced)
        sliced.observe(self.units, query)
        query, key = self._normed("q", query, sliced), self._normed("k", self._project("k", x, sliced), sliced)
        query, key = rotate((query, key), *self.rotary(query, documents))
        y = causal_attention(query, key, value, documents)
        weight = sliced.writing_weight(self, self.layout, "o_proj.weight", self.layer, self.units)
        sliced.observe(self.units, y, weight)
        return F.linear(y, weight, sliced.writing_bias(self, self.layout, "o_proj.bias", self.layer))

    def _project(self, name: str, x: Tensor, sliced: Slice) -> Tensor:
        """Queries, keys or values, (B, L, heads, head_dim)."""
        weight, bias = (sliced.weight(self, self.layout, f"{name}_proj.{part}") for part in ("weight", "bias"))
        return F.linear(x, weight, bias).unflatten(-1, (-1, self.head_dim))

    def _normed(self, name: str, heads: Tensor, sliced: Slice) -> Tensor:
        """Queries or keys (B, L, heads, head_dim), in Qwen3 each head normalised by itself."""
        weight = sliced.weight(self, self.layout, f"{name}_norm.weight")
        return heads if weight is None else rms_norm(heads, weight, self.eps, self.head_dim)


class MLP(nn.Module):
    """W_down · (act(W_gate x) · W_up x).

    The rank measure `projection` scores neurons by the product in brackets. In eq. 2 it is W1 x, which a gated MLP does
    not have.
    """

    def __init__(self, config, layer: int, layout: Layout):
        super().__init__()
        self.layout, self.layer, self.units = layout, layer, f"ffn.{layer}"
        self.act = activation(config.hidden_act)
        add_parameters(self, layout)

    def forward(self, x: Tensor, sliced: Slice) -> Tensor:
        gate, up = (
            F.linear(x, *(sliced.weight(self, self.layout, f"{name}_proj.{part}") for part in ("weight", "bias")))
            for name in ("gate", "up")
        )
        x = self.act(gate) * up
        sliced.observe(self.units, x)
        weight = sliced.writing_weight(self, self.layout, "down_proj.weight", self.layer, self.units)
        sliced.observe(self.units, x, weight)
        return F.linear(x, weight, sliced.writing_bias(self, self.layout, "down_proj.bias", self.layer))


class Block(nn.Module):
    """y = x + attention(norm(x)); y + mlp(norm(y)). The depth gate of the layer multiplies both outputs."""

    def __init__(self, config, layer: int, layout: Layout):
        super().__init__()
        self.self_attn = Attention(config, layer, part_of(layout, "self_attn"))
        self.mlp = MLP(config, layer, part_of(layout, "mlp"))
        for name in NORMS.values():
            norm = Norm(f"model.layers.{layer}.{name}.weight", norm_eps(config), part_of(layout, name))
            self.add_module(name, norm)

    def forward(self, x: Tensor, sliced: Slice, documents: Documents | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x, sliced), sliced, documents)
        return x + self.mlp(self.post_attention_layernorm(x, sliced), sliced)
