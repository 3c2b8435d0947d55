"""The memory to serve a submodel, as a cost metric (see metrics.py)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elastic_core.config import require
from elastic_core.cost.element_types import ELEMENT_BYTES, QUANTISED
from elastic_core.model import architectures
from elastic_core.model.dims import Concat, Fixed, Layout, Product, Units, count, is_matrix, is_stack, layer_index

UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


@dataclass(frozen=True)
class Memory:
    """The bytes to serve `batch` sequences of `context` tokens each. The string fields name element types.

    - `weights`: type of the layers' matrices. Quantised checkpoints (fp8, int8, fp4) keep embeddings, head,
      convolutions and vectors in bf16, so these are counted in bf16. For any other type, all parameters have that type.
    - `cache`: type of the keys and values of every token in every kept attention layer.
    - `state`: type of the state in every kept Mamba layer. Serving engines keep it in float32 for `nemotron_h`,
      because it accumulates over the whole text.
    - `conv_state`: type of the last inputs of the convolution in every kept Mamba layer. Engines keep them in the type
      of the activations. As in transformers, there are as many as the kernel is long (in vLLM one fewer).
    - `activations`: type of the activations. A prompt is read in chunks of `chunk` tokens over all sequences, and a
      decoding step reads `batch` tokens. This part is the largest amount in memory at one time: the residual stream,
      its normed copy and the inputs and outputs of one layer's matrices, or the float32 logits of one token per
      sequence. It does not include attention scores and the chunks of the scan, because fused kernels never have all of
      them in memory. It does not include the one or two GB of the engine itself.

    All parts except activations are multilinear in the sizes, so their expectation is exact. Activations are a maximum
    over layers, and `count` takes the maximum of the layers' expected values. This is a lower bound of the expected
    maximum. It is exact if every choice has probability 0 or 1. If two layers are equal, they share the gradient.

    Raises ConfigError for an invalid field.
    """

    name: ClassVar = "memory"

    context: int
    batch: int = 1
    weights: str = "bf16"
    cache: str = "bf16"
    state: str = "float32"
    conv_state: str = "bf16"
    activations: str = "bf16"
    chunk: int = 2048

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("context", "batch", "chunk"):
                require(value >= 1, field.name, value, "1 or more")
            else:
                require(value in ELEMENT_BYTES, field.name, value, ", ".join(ELEMENT_BYTES))

    def count(self, config, sizes: Mapping, keep: Callable[[int], object]):
        return sum(self.parts(config, sizes, keep).values())

    def parts(self, config, sizes: Mapping, keep: Callable[[int], object]) -> dict:
        """The bytes by purpose: weights, kv_cache, ssm_state, conv_state, activations."""
        layout = architectures.parameter_layout(config)
        matrices = {name: dims for name, dims in layout.items() if is_matrix(dims) and layer_index(name) is not None}
        rest = {name: dims for name, dims in layout.items() if name not in matrices}
        caches = cache_layouts(config, self.batch, self.context)
        types = {"kv_cache": self.cache, "ssm_state": self.state, "conv_state": self.conv_state}
        rest_type = "bf16" if self.weights in QUANTISED else self.weights
        return {
            "weights": ELEMENT_BYTES[self.weights] * count(matrices, sizes, keep)
            + ELEMENT_BYTES[rest_type] * count(rest, sizes, keep),
            **{name: ELEMENT_BYTES[types[name]] * count(caches[name], sizes, keep) for name in types},
            "activations": self._activations(config, layout, sizes, keep),
        }

    def _activations(self, config, layout: Layout, sizes: Mapping, keep: Callable[[int], object]):
        """The bytes of the layer with the largest activations, or of the logits if they are larger."""
        tokens = max(self.batch, min(self.chunk, self.batch * self.context))
        layers = (
            ELEMENT_BYTES[self.activations] * tokens * alive.count(sizes) * keep(layer)
            for layer, alive in alive_per_token(config, layout).items()
        )
        return functools.reduce(_larger, layers, ELEMENT_BYTES["float32"] * self.batch * config.vocab_size)

    def number(self, cost: float) -> str:
        """A cost as short text, for the first value of a range."""
        unit, size = next((item for item in UNITS.items() if cost >= item[1]), ("KiB", 2**10))
        return f"{cost / size:,.2f} {unit}"

    def text(self, cost: float) -> str:
        """A cost as text for people, with its unit."""
        return self.number(cost)

    @property
    def setting(self) -> str:
        """The settings on which the cost depends, as text for people."""
        return f"{self.context:,} tokens × {self.batch}, weights {self.weights}, cache {self.cache}"

    def to_json(self) -> str | dict:
        """The value in elastic.json that `read_metric` reads."""
        return {"metric": self.name, **dataclasses.asdict(self)}


def cache_layouts(config, batch: int, context: int) -> dict[str, Layout]:
    """The layouts `kv_cache`, `ssm_state` and `conv_state` of `batch` sequences of `context` tokens each."""
    sequences, tokens = Fixed(batch), Fixed(context)
    layouts: dict[str, Layout] = {"kv_cache": {}, "ssm_state": {}, "conv_state": {}}
    for kind, layout in architectures.kept_state(config).items():
        outer = (sequences, tokens) if kind == "kv_cache" else (sequences,)
        layouts[kind] = {name: outer + dims for name, dims in layout.items()}
    return layouts


def alive_per_token(config, layout: Layout) -> dict[int, Concat]:
    """For each layer, how many activations of one token are in memory at one time.

    They are the residual stream and its normed copy (twice the hidden size), and for every matrix the inputs or
    outputs that are not hidden channels. Of routed experts, the outputs of each matrix, for each expert of the token.
    """
    hidden, alive = architectures.units(config)["hidden"], {}
    for name, dims in layout.items():
        if (layer := layer_index(name)) is not None:
            sides = alive.setdefault(layer, [hidden, hidden])
            if is_stack(dims):
                sides.append(Product((Fixed(config.num_experts_per_tok), dims[1])))
            elif len(dims) == 2:
                sides += [dim for dim in dims if not (isinstance(dim, Units) and dim.key == hidden.key)]
    return {layer: Concat(tuple(sides)) for layer, sides in alive.items()}


def _larger(left, right):
    """The larger of two numbers; element by element if one or both are tensors."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return torch.maximum(torch.as_tensor(left), torch.as_tensor(right))
    return max(left, right)
