"""Model families: what of the library depends on whose layers a model is made of; one module per family.

A family is a table of named dimensions and the forward of its layers. Its module has:

- `MODELS`: model_type → transformers' configuration and causal language model; `EMBEDDINGS`, `FINAL_NORM`: what those
  parts of the trunk are called; `norm_eps(config)`.
- `requirements(config)`: what has to hold of a parent, and what to say where it does not.
- `pattern(config)`: a character per layer, for people. `units(config)`: every unit key with its size and groups.
  `parameter_layout(config)`: the table, made of those; it has everything that files hold, what is not trained too.
- `kept_state(config)`: what a layer keeps of a text, as layouts `kv_cache` (of a token), `ssm_state` and `conv_state`
  (of a sequence).
- `Block(config, layer, layout)`: a layer, `forward(x, cut)`.
- `mixing_flops(config, sizes, kept, length, on_gpu)`: operations that multiply no weights (flops.py);
  `scan_block(config, layer, sequences)`: how a layer's scan is cut into pieces of work, or None (memory.py).
- Experts: a stack (experts.i, rows, columns) in the table is a matrix per expert in files (experts.py), and of it a
  token uses `config.num_experts_per_tok`; nothing else is to be said of them.
- `WIDE`: ends of names of what stays in float32 in a model of bfloat16, as in transformers.
- `canonical_name(name)` of a tensor in a file (None: left out), `disk_name(name)` of a parameter, and
  `file_values(values)`: what config.json says besides.
- `config_changes(config, kept_layers, widths)` of a submodel, where a list has an entry per kept layer;
  `MODELING_FILE`: what travels with a model whose widths differ between layers, with `REMOTE_CLASSES`, or None where
  such a model cannot be expressed; `size_problem(config, hidden_size, num_attention_heads)`: why transformers would
  refuse a directory of these sizes, or None; `can_cache(config, kept_layers)`: whether it decodes them with a cache.
- `finish(model, device)`: what a model of transformers without storage needs besides its parameters;
  `copy_state(config, layer, state, within, cache, number)`: a part of what a layer remembers of a text (nested.py).
"""

from types import ModuleType

import torch

import elastic_core.model.architectures.llama as llama
import elastic_core.model.architectures.nemotron_h as nemotron_h
from elastic_core.errors import UserError
from elastic_core.model.dims import Fixed, Layout, Units, is_stack

ARCHITECTURES = {model_type: family for family in (nemotron_h, llama) for model_type in family.MODELS}


def find(model_type: str | None, where: str) -> ModuleType:
    """The family of a model_type; ValueError where there is none."""
    if model_type not in ARCHITECTURES:
        raise UserError(f"{where}: model_type is {model_type!r}; allowed: {', '.join(map(repr, ARCHITECTURES))}")
    return ARCHITECTURES[model_type]


def of(config) -> ModuleType:
    """The family of a configuration."""
    return find(config.model_type, "config")


def units(config) -> dict[str, Units]:
    """Every unit key of a configuration's models, with its full size and groups, in the order of the layers."""
    return of(config).units(config)


def parameter_layout(config) -> Layout:
    """Name and dimensions of every parameter of a configuration's models, in file order."""
    return of(config).parameter_layout(config)


def active_layout(config) -> Layout:
    """The parameters that one token uses: of the experts of a layer as many as it is routed to, of all else all."""
    return {
        name: (Fixed(config.num_experts_per_tok), *dims[1:]) if is_stack(dims) else dims
        for name, dims in parameter_layout(config).items()
    }


def held_in(config, name: str, dtype: torch.dtype) -> torch.dtype:
    """The element type of a parameter in a model of `dtype`: float32 at least where transformers keeps it so."""
    return torch.promote_types(dtype, torch.float32) if name.endswith(of(config).WIDE) else dtype


def has_experts(config) -> bool:
    """Whether a token uses only some of the parameters."""
    return any(is_stack(dims) for dims in parameter_layout(config).values())


def kept_state(config) -> dict[str, Layout]:
    """What the layers keep of a text: `kv_cache` of every token, `ssm_state` and `conv_state` of every sequence."""
    return of(config).kept_state(config)


def pattern(config) -> str:
    """The layers as characters, one each, for people."""
    return of(config).pattern(config)


def num_layers(config) -> int:
    """How many layers the parent has."""
    return len(pattern(config))
