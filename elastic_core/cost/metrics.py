"""What a submodel costs, exactly and in expectation (eq. 12): its parameters, the memory of serving it, or its time.

A metric is a frozen dataclass whose `count(config, sizes, keep)` reads sizes by unit key, and `keep(i)`, 1 or 0 or the
probability that layer i is kept. With numbers the count is exact; with tensors it is differentiable, and of shapes
that broadcast together, so that one call counts a whole grid of submodels. Whatever can be counted so is a metric:
routing, selection and targets ask for nothing else. Latency and throughput are in latency.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elastic_core.config import require
from elastic_core.cost.latency import TIMED, Timed
from elastic_core.cost.latency_table import Table
from elastic_core.model import architectures
from elastic_core.model.dims import Concat, Fixed, Layout, Product, Units, count, is_matrix, is_stack, layer_index
from elastic_core.model.submodel import Submodel

# Bytes per element. fp4 has a scale of one byte for every 16 elements (NVFP4); the scales of fp8 and int8, one for a
# row, a block or a tensor, are too few to count.
PRECISIONS = {"float32": 4, "bf16": 2, "fp8": 1, "int8": 1, "fp4": 0.5625}
QUANTISED = ("fp8", "int8", "fp4")
UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


@dataclass(frozen=True)
class Parameters:
    """The number of parameters. Multilinear in sizes that are drawn independently: the expectation is exact."""

    name: ClassVar = "parameters"

    def count(self, config, sizes: Mapping, keep: Callable[[int], object]):
        return count(architectures.parameter_layout(config), sizes, keep)

    def number(self, cost: float) -> str:
        """A cost for people, among others of its kind."""
        return f"{cost:,.0f}"

    def text(self, cost: float) -> str:
        """A cost for people, with its unit."""
        return f"{cost:,.0f} parameters"

    @property
    def setting(self) -> str:
        """What else a cost depends on, for people."""
        return ""

    def to_json(self) -> str | dict:
        """What `read_metric` reads."""
        return self.name


@dataclass(frozen=True)
class ActiveParameters(Parameters):
    """The number of parameters that one token uses: of routed experts as many as it is sent to, of all else all.

    So it is less in narrower experts, but not in fewer of them, save for their rows of the router.
    """

    name: ClassVar = "active_parameters"

    def count(self, config, sizes: Mapping, keep: Callable[[int], object]):
        return count(architectures.active_layout(config), sizes, keep)

    def text(self, cost: float) -> str:
        """A cost for people, with its unit."""
        return f"{cost:,.0f} active parameters"


@dataclass(frozen=True)
class Memory:
    """Bytes that serving takes: `batch` sequences of `context` tokens each, in element types of `PRECISIONS`.

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
                require(value in PRECISIONS, field.name, value, ", ".join(PRECISIONS))

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
            "weights": PRECISIONS[self.weights] * count(matrices, sizes, keep)
            + PRECISIONS[of_rest] * count(rest, sizes, keep),
            **{name: PRECISIONS[types[name]] * count(kept[name], sizes, keep) for name in types},
            "activations": self._activations(config, layout, sizes, keep),
        }

    def _activations(self, config, layout: Layout, sizes: Mapping, keep: Callable[[int], object]):
        tokens = max(self.batch, min(self.chunk, self.batch * self.context))
        layers = (
            PRECISIONS[self.activations] * tokens * alive.count(sizes) * keep(layer)
            for layer, alive in alive_per_token(config, layout).items()
        )
        return functools.reduce(_larger, layers, PRECISIONS["float32"] * self.batch * config.vocab_size)

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


Metric = Parameters | Memory | Timed
PARAMETERS, ACTIVE_PARAMETERS = Parameters(), ActiveParameters()
COUNTED = {metric.name: metric for metric in (PARAMETERS, ACTIVE_PARAMETERS)}


def read_metric(value: str | dict) -> Metric:
    """The metric of an ``elastic.json``. Raises ValueError for one that a later version may know."""
    if isinstance(value, str) and value in COUNTED:
        return COUNTED[value]
    fields = dict(value) if isinstance(value, Mapping) else {}
    name, reason = fields.pop("metric", value), ""
    try:
        if name == Memory.name:
            return Memory(**fields)
        if name in TIMED:
            return TIMED[name](Table.from_json(fields["table"]), fields["context"])
    except (TypeError, ValueError, KeyError) as error:
        reason = f" ({type(error).__name__}: {error})"
    raise ValueError(
        f"cost: got {name!r}{reason}; allowed: parameters, active_parameters, or the fields of metric memory, latency "
        "or throughput, as this version writes them"
    )


def exact_cost(metric: Metric, config, submodel: Submodel | None = None) -> int | float:
    """Cost of `submodel` (None: the parent)."""
    return metric.count(config, *_certain(config, submodel))


def expected_cost(metric: Metric, config, sizes: Mapping[str, Tensor], keep_probs: Tensor) -> Tensor:
    """Expected cost (eq. 12), differentiable.

    `sizes` maps unit keys to expected sizes, `keep_probs` (layers, ...) holds the probability that depth keeps each
    layer. Entries may have any shapes that broadcast together, so one call can count a whole grid of submodels.
    """
    return metric.count(config, sizes, keep=lambda layer: keep_probs[layer])


def num_parameters(config, submodel: Submodel | None = None) -> int:
    """Number of parameters of `submodel` (None: the parent), equal to what the files of the extracted model hold.

    That is sum(p.numel()), and of mixtures of experts the correction of the router's scores, transformers' one buffer.
    """
    return exact_cost(PARAMETERS, config, submodel)


def num_active_parameters(config, submodel: Submodel | None = None) -> int | None:
    """Number of parameters of `submodel` (None: the parent) that one token uses; None where that is all of them."""
    return exact_cost(ACTIVE_PARAMETERS, config, submodel) if architectures.has_experts(config) else None


def memory_parts(metric: Memory, config, submodel: Submodel | None = None) -> dict[str, int | float]:
    """Bytes of `submodel` (None: the parent) by reason, see `Memory.parts`."""
    return metric.parts(config, *_certain(config, submodel))


def _certain(config, submodel: Submodel | None) -> tuple[dict[str, int], Callable[[int], int]]:
    """`sizes` and `keep` of one submodel."""
    submodel = (submodel or Submodel()).resolve(config)
    kept = set(submodel.kept_layers)
    return submodel.sizes(config), lambda layer: int(layer in kept)


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
