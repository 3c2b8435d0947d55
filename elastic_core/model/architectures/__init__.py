"""Architecture-specific code, one module for each architecture. This file finds the module of a configuration.

An architecture is a table of named dimensions (dims.py) and the forward pass of its layers. Its module defines:

Names and sizes

- `MODELS`: model_type → names of transformers' (configuration class, causal language model class).
- `EMBEDDINGS`, `FINAL_NORM`: the names of these two modules in the trunk. `norm_eps(config)`.
- `requirements(config)`: conditions on a parent, each as (holds, message if it does not hold).
- `max_positions(config)`: the longest text for which position embeddings are made, or None. `scale_positions(config,
  scaling)`: scale them to longer texts, in place.
- `clamp_time_step(config)`: limit the time step of Mamba layers as transformers does, in place.
- `pattern(config)`: one character per layer, which names its kind.
- `units(config)`: every unit key with its size and groups.
- `parameter_layout(config)`: the table. It lists everything that files hold, including tensors that are not trained.
- `norm_before(name)`: the name of the norm whose output a matrix of a layer reads.
- `kept_state(config)`: what a layer keeps of a text during decoding, as layouts `kv_cache` (for one token), `ssm_state`
  and `conv_state` (for one sequence).
- `WIDE`: endings of the names of parameters that stay in float32 in a bfloat16 model, as in transformers.
  `WIDE_IN_FILES`: those that stay in float32 in bfloat16 files.

Layers and their cost in training

- `Block(config, layer, layout)`: a layer with `forward(x, sliced, documents)`. Documents (documents.py) do not see each
  other.
- `mixing_flops(config, sizes, kept, length, pairs, on_gpu)`: operations that do not multiply weights (ops/flops.py).
- `scan_block(config, layer, sequences)`: the positions that the scan of a layer processes at one time, or None.
  `set_scan_kernel(block, find)`: let such a layer find its kernel by another function, to count its memory.

Files

- `canonical_name(name)`: the parameter's name for a tensor in a file (None: the tensor is not used).
  `disk_name(name)`: the reverse.
- `file_values(values)`: the values of config.json, as other programs read them.
- `config_changes(config, kept_layers, widths)`: the values in a submodel's configuration that differ from the parent's.
  A list in `widths` has one entry per kept layer.
- `MODELING_FILE`, `REMOTE_CLASSES`: the modeling file that is copied beside a model with different widths in its
  layers, and the classes in it. None: such a model can only be exported with padded MLPs.
- `size_problem(config, hidden_size, num_attention_heads)`: why readers of the files cannot load these sizes, or None.

Decoding with transformers (export/nested.py)

- `can_cache(config, kept_layers)`: whether transformers can decode with a cache if only these layers are kept.
- `pads_exactly(config)`: whether transformers computes left-padded rows as it computes each row alone.
- `finish(model, device)`: add everything except parameters to a transformers model that was built without memory.
- `copy_state(config, layer, state, within, cache, number)`: copy a part of a layer's cache to a smaller model's cache.

Experts need no further definitions: a stack (experts.i, rows, columns) in the table is one matrix for each expert in
files (files/experts.py), and a token uses `config.num_experts_per_tok` of them.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType

import torch
import transformers

import elastic_core.model.architectures.llama as llama
import elastic_core.model.architectures.nemotron_h as nemotron_h
from elastic_core.config import require
from elastic_core.errors import UserError
from elastic_core.model.dims import Fixed, Layout, Units, is_matrix, is_stack, layer_index
from elastic_core.model.ops import transformers_kernels

HEAD = "lm_head.weight"
# model_type → module
ARCHITECTURES = {name: architecture for architecture in (nemotron_h, llama) for name in architecture.MODELS}
MOST_TABLES = 64  # kept at one time
_TABLES: dict[tuple, tuple[dict, dict]] = {}  # of `_table`


def find(model_type: str | None, where: str) -> ModuleType:
    """The module of a model_type. Raises UserError for an unknown one; `where` starts the message."""
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UserError(f"{where}: model_type is {model_type!r}; allowed: {', '.join(map(repr, ARCHITECTURES))}")
    return ARCHITECTURES[model_type]


def of(config) -> ModuleType:
    """The module of a configuration's architecture."""
    return find(config.model_type, "config")


def config_class(model_type: str | None, where: str) -> type:
    """The configuration class of a model_type in transformers. Raises UserError like `find`."""
    return getattr(transformers, find(model_type, where).MODELS[model_type][0])


def model_class(config) -> type:
    """The causal language model class of a configuration in transformers, whose import takes a second.

    Its models run on CPUs and GPUs, whichever kernels are installed.
    """
    found = getattr(transformers, of(config).MODELS[config.model_type][1])
    transformers_kernels.choose_by_device()
    return found


def units(config) -> dict[str, Units]:
    """Every unit key with its full size and groups, in the order of the layers."""
    return _table(config, of(config).units)


def parameter_layout(config) -> Layout:
    """The name and dimensions of every parameter, in file order."""
    return _table(config, of(config).parameter_layout)


def _table(config, make: Callable[[object], dict]) -> dict:
    """A copy of the mapping `make(config)`. It is made again only if a value of the configuration has changed, or if
    many other configurations were read since.

    One count of parameters needs these tables several times, and a search counts thousands of submodels.
    """
    key, values = (id(config), type(config), make), vars(config)
    kept = _TABLES.get(key)
    if kept is None or kept[0] != values:
        _TABLES[key] = kept = copy.deepcopy(values), make(config)
        if len(_TABLES) > MOST_TABLES:
            _TABLES.pop(next(iter(_TABLES)), None)  # the oldest
    return dict(kept[1])


def norm_names(config) -> list[str]:
    """The names of the norms of the residual stream, in the order of the forward pass. The final norm is the last."""
    names = [of(config).norm_before(name) for name in reading_matrices(config) if name != HEAD]
    return [*dict.fromkeys(names), f"model.{of(config).FINAL_NORM}.weight"]


def reading_matrices(config) -> dict[str, str]:
    """The matrices that read the residual stream: name → the norm whose output it reads. With the head."""
    layout, architecture = parameter_layout(config), of(config)
    readers = (
        name
        for name, dims in layout.items()
        if layer_index(name) is not None
        and is_matrix(dims)
        and isinstance(dims[-1], Units)
        and dims[-1].key == "hidden"
    )
    found = {name: architecture.norm_before(name) for name in readers}
    return found | ({HEAD: f"model.{architecture.FINAL_NORM}.weight"} if HEAD in layout else {})


def shapes(config) -> dict[str, tuple[int, ...]]:
    """The name and shape of every parameter."""
    return {name: tuple(dim.size for dim in dims) for name, dims in parameter_layout(config).items()}


def active_layout(config) -> Layout:
    """The layout of the parameters that one token uses: `num_experts_per_tok` experts of each stack, and the rest."""
    return {
        name: (Fixed(config.num_experts_per_tok), *dims[1:]) if is_stack(dims) else dims
        for name, dims in parameter_layout(config).items()
    }


def held_in(config, name: str, dtype: torch.dtype) -> torch.dtype:
    """The element type of a parameter in a model of `dtype`: at least float32 for the parameters named in `WIDE`."""
    return torch.promote_types(dtype, torch.float32) if name.endswith(of(config).WIDE) else dtype


def stored_in(config, name: str, dtype: torch.dtype) -> torch.dtype:
    """The element type of a parameter in files of `dtype`: at least float32 for those named in `WIDE_IN_FILES`."""
    return torch.promote_types(dtype, torch.float32) if name.endswith(of(config).WIDE_IN_FILES) else dtype


def cache_values(config, kept_layers: Iterable[int] | None = None) -> dict:
    """What config.json and generation_config.json say where transformers cannot decode with a cache, else nothing.

    `kept_layers` None: all layers.
    """
    kept = range(num_layers(config)) if kept_layers is None else kept_layers
    return {} if of(config).can_cache(config, kept) else {"use_cache": False}


def has_experts(config) -> bool:
    """Whether a layer has routed experts, so that a token uses only a part of the parameters."""
    return any(is_stack(dims) for dims in parameter_layout(config).values())


def kept_state(config) -> dict[str, Layout]:
    """What layers keep of a text: layouts `kv_cache` (for one token), `ssm_state`, `conv_state` (for one sequence)."""
    return of(config).kept_state(config)


def pattern(config) -> str:
    """One character per layer, which names its kind."""
    return of(config).pattern(config)


def max_positions(config) -> int | None:
    """The longest text for which position embeddings are made, in tokens. None: there are no position embeddings."""
    return of(config).max_positions(config)


def with_rope_scaling(config, scaling: Mapping | None):
    """A copy of a configuration with scaled rotary positions and a larger max_position_embeddings. None: no change.

    `scaling` is checked (rope_scaling.py). Raises UserError for an architecture without rotary positions.
    """
    if scaling is None:
        return config
    config = copy.deepcopy(config)
    of(config).scale_positions(config, scaling)
    return config


def with_clamped_time_step(config):
    """A copy of a configuration in which the time step is limited as in transformers.

    A layer's time step is limited by the checkpoint's `time_step_limit`. transformers ignores that, and takes
    `time_step_min` for the lower limit. Raises UserError for an architecture without a time step.
    """
    config = copy.deepcopy(config)
    of(config).clamp_time_step(config)
    return config


def with_own_head(config):
    """A copy of a configuration in which the head is not the embeddings. Raises ConfigError if it is so already."""
    allowed = "false, because the parent's head is not tied to its embeddings"
    require(config.tie_word_embeddings, "parent.untie_head", True, allowed)
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    return config


def smallest_part(config) -> int:
    """The fewest positions that a part of a row may have, where several workers share it: a convolution reaches back
    into one part only.
    """
    return max([1, *(dims[-1].size - 1 for dims in kept_state(config).get("conv_state", {}).values())])


def pads_exactly(config) -> bool:
    """Whether transformers computes left-padded rows as it computes each row alone."""
    return of(config).pads_exactly(config)


def num_layers(config) -> int:
    """The number of the parent's layers."""
    return len(pattern(config))
