"""The memory of serving a submodel as a cost."""

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
    """Bytes that serving takes: `batch` sequences of `context` tokens each, in element types of `ELEMENT_BYTES`.

    - `weights`: of the layers' matrices. Quantised checkpoints (fp8, int8, fp4) leave embeddings, head, convolutions
      and vectors in bf16, and so are these counted; otherwise all parameters are of this type.
    - `cache`: keys and values of every token in every kept attention layer.
    - `state`: the state space's, in every kept Mamba layer. Engines hold it in float32 for `nemotron_h`, since it sums
      over the whole text, and the window of the convolution (`conv_state`) in the activations' bf16. The window is
      transformers', as long as the kernel; vLLM's is a token shorter.
    - `activations`: at most alive while `chunk` tokens are read (those of all sequences together; a step of decoding
      reads `batch`): the residual stream, the normed input and both sides of the layer's matrices, or the logits of
      one token a sequence in float32. Attention's scores and the scan's chunks, which fused kernels hold in pieces,
      and the engine's own gigabyte or two are not counted.

    All but activations are multilinear in the sizes, as parameters are. The expectation of a maximum over layers is
    not the maximum of the layers' expectations, which is counted instead: a lower bound of it, exact where every
    choice is certain, and differentiable but where layers tie (there the gradient is shared).
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
        """Bytes by reason: weights, kv_cache, ssm_state, conv_state, activations."""
        layout = architectures.parameter_layout(config)
        matrices = {name: dims for name, dims in layout.items() if is_matrix(dims) and layer_index(name) is not None}
        rest = {name: dims for name, dims in layout.items() if name not in matrices}
        kept = cache_layouts(config, self.batch, self.context)
        types = {"kv_cache": self.cache, "ssm_state": self.state, "conv_state": self.conv_state}
        of_rest = "bf16" if self.weights in QUANTISED else self.weights
        return {
            "weights": ELEMENT_BYTES[self.weights] * count(matrices, sizes, keep)
            + ELEMENT_BYTES[of_rest] * count(rest, sizes, keep),
            **{name: ELEMENT_BYTES[types[name]] * count(kept[name], sizes, keep) for name in types},
            "activations": self._activations(config, layout, sizes, keep),
        }

    def _activations(self, config, layout: Layout, sizes: Mapping, keep: Callable[[int], object]):
        tokens = max(self.batch, min(self.chunk, self.batch * self.context))
        layers = (
            ELEMENT_BYTES[self.activations] * tokens * alive.count(sizes) * keep(layer)
            for layer, alive in alive_per_token(config, layout).items()
        )
        return functools.reduce(_larger, layers, ELEMENT_BYTES["float32"] * self.batch * config.vocab_size)

    def number(self, cost: float) -> str:
        """A cost for people, among others of its kind."""
        unit, size = next((item for item in UNITS.items() if cost >= item[1]), ("KiB", 2**10))
        return f"{cost / size:,.2f} {unit}"

    def text(self, cost: float) -> str:
        """A cost for people, with its unit."""
        return self.number(cost)

    @property
    def setting(self) -> str:
        """What else a cost depends on, for people."""
        return f"{self.context:,} tokens × {self.batch}, weights {self.weights}, cache {self.cache}"

    def to_json(self) -> str | dict:
        """What `read_metric` reads."""
        return {"metric": self.name, **dataclasses.asdict(self)}


def cache_layouts(config, batch: int, context: int) -> dict[str, Layout]:
    """What a model keeps of `batch` sequences of `context` tokens, as layouts `kv_cache`, `ssm_state`, `conv_state`."""
    sequences, tokens = Fixed(batch), Fixed(context)
    kept: dict[str, Layout] = {"kv_cache": {}, "ssm_state": {}, "conv_state": {}}
    for kind, layout in architectures.kept_state(config).items():
        of_each = (sequences, tokens) if kind == "kv_cache" else (sequences,)
        kept[kind] = {name: of_each + dims for name, dims in layout.items()}
    return kept


def alive_per_token(config, layout: Layout) -> dict[int, Concat]:
    """By layer, the numbers that are there at once for a token: twice the hidden size, and each matrix's other side.

    Of routed experts, what each of them that the token is sent to writes with each of its matrices.
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
    """The larger of two numbers, or of two tensors or a tensor and a number, entry by entry."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return torch.maximum(torch.as_tensor(left), torch.as_tensor(right))
    return max(left, right)
