"""A table of measured seconds, from which latency.py predicts the time of a submodel.

`elastic measure` (tasks/commands/measure.py) measures the table once, on the device that will serve the model. For
every kind of layer it has the seconds of one layer, for a grid of sizes. The part `rest` has everything else of a step
(embeddings, final norm, head, the overhead of a step), for a grid of hidden sizes. The prediction for a model is the
sum over its kept layers, plus the rest. Between the points of a grid, every size and the context are interpolated
linearly.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from elastic_core.config import ConfigError
from elastic_core.errors import UserError
from elastic_core.io.atomic import write_text
from elastic_core.io.json_files import check_shape, parse_json
from elastic_core.model import architectures
from elastic_core.model.axes import FIELDS
from elastic_core.model.dims import Concat, Dim, Fixed, Product, Units, is_stack, layer_index, layer_of

FORMAT = 1  # of table files
SHAPE = {
    **{"contexts": [int], "batch": int, "dtype": str, "device": str, "threads": int},
    **{"environment": {str: (str, int)}, "shape": {str: {str: str}}},
    "parts": {str: {"axes": [str], "grid": [[int]], "decode": list, "prefill": list}},
}
REST = "rest"  # the part with everything that does not belong to a layer
ROUNDING = 1e-5  # relative; an expected size may lie outside the grid by this much, because of rounding
REMEDY = "measure it again with `elastic measure PROFILE`"


@dataclass(frozen=True)
class Part:
    """Seconds of one kind of layer, or of the rest, for a grid of sizes.

    `axes` names the dimensions of the grid (hidden is the first), and `grid` has their sizes in ascending order.
    `decode` and `prefill` are nested tuples of shape (contexts, *grid). `decode` has the seconds of one step, which
    generates one token for every sequence; `prefill` has the seconds of one token of a prompt.
    """

    axes: tuple[str, ...]
    grid: tuple[tuple[int, ...], ...]
    decode: tuple
    prefill: tuple

    @classmethod
    def read(cls, values: Mapping, contexts: Sequence[int]) -> Part:
        """Read JSON values. Raises UserError unless all seconds are above 0 and have the shape of the grid."""
        part = cls(*(_tuples(values[name]) for name in ("axes", "grid", "decode", "prefill")))
        if not all(part.grid):
            raise UserError("no sizes in a grid")
        shape = (len(contexts), *map(len, part.grid))
        for seconds in (part.decode, part.prefill):
            found = torch.tensor(seconds, dtype=torch.float64)
            if found.shape != shape or not (found > 0).all():
                raise UserError(f"seconds of shape {tuple(found.shape)}; expected {shape}, all above 0")
        if len(part.axes) != len(part.grid) or any(list(points) != sorted(set(points)) for points in part.grid):
            raise UserError("sizes of a grid are not in ascending order")
        return part


@dataclass(frozen=True)
class Table:
    """A table: `parts` maps a kind of layer (its character in the pattern), or REST, to its seconds.

    They were measured for `batch` sequences with `contexts` tokens each. `shape` describes the parent's layers (see
    `shape_of`). `environment` names the machine and the versions, for people. `threads` matters for a CPU only.
    """

    contexts: tuple[int, ...]
    batch: int
    dtype: str
    device: str
    threads: int
    environment: dict[str, str | int]
    shape: dict[str, dict[str, str]]
    parts: dict[str, Part]

    @classmethod
    def from_json(cls, values: Mapping) -> Table:
        """Read JSON values. Raises UserError unless they are a table of this format."""
        try:
            check_shape(values, {"format": int}, "not a table of latencies")
            fields = dict(values)
            if fields.pop("format") != FORMAT:
                raise UserError(f"not a table of format {FORMAT}")
            check_shape(fields, SHAPE, "not a table of latencies")
            contexts = fields["contexts"] = _tuples(fields["contexts"])
            if not contexts or list(contexts) != sorted(set(contexts)) or contexts[0] < 1 or fields["batch"] < 1:
                raise UserError("contexts are not in ascending order, or the batch is below 1")
            parts = {kind: Part.read(part, fields["contexts"]) for kind, part in fields.pop("parts").items()}
            return cls(parts=parts, **fields)
        except (TypeError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"not a table of latencies ({type(error).__name__}: {error})") from None

    @classmethod
    def load(cls, path: str | os.PathLike, where: str = "cost.table") -> Table:
        """Read a file that `save` wrote. Raises ConfigError if it does not exist or is not a table."""
        allowed = "a file that `elastic measure PROFILE` writes on the device that will serve the model"
        if not os.path.isfile(path):
            raise ConfigError(f"{where}: got {str(path)!r}, which does not exist; allowed: {allowed}")
        try:
            return cls.from_json(parse_json(Path(path).read_bytes(), "the file", shape=object))
        except UserError as error:
            raise ConfigError(f"{where}: got {str(path)!r} ({error}); allowed: {allowed}") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write a JSON file, complete or not at all."""
        write_text(path, json.dumps(self.to_json()) + "\n")

    def to_json(self) -> dict:
        """The JSON values that `from_json` reads."""
        return {"format": FORMAT, **asdict(self)}

    def check(self, config) -> None:
        """Raise ConfigError if the parent `config` has other shapes than the measured one."""
        axes = {kind: part.axes for kind, part in self.parts.items()}
        if axes != axes_of(config):
            raise ConfigError(
                f"cost.table: measured for the parts {axes}, but the parent has {axes_of(config)}; allowed: a table of "
                f"this parent; {REMEDY}"
            )
        for kind, shapes in shape_of(config).items():
            known = self.shape.get(kind, {})
            for name in {**shapes, **known}:
                if known.get(name) != shapes.get(name):
                    kind_text = "" if kind == REST else f"layers {kind}, "
                    raise ConfigError(
                        f"cost.table: measured for {kind_text}{name} of {known.get(name, 'no size at all')}, but the "
                        f"parent has {shapes.get(name, 'none')}; allowed: a table of this parent; {REMEDY}"
                    )

    def seconds(self, config, sizes: Mapping, keep: Callable[[int], object], context: int, phase: str = "decode"):
        """Seconds of one decoding step for the whole batch, or with `phase` "prefill" of one token of a prompt.

        `sizes` and `keep` are as in metrics.py: numbers, or tensors of shapes that broadcast together.
        Raises ConfigError for a parent with other shapes, and for sizes outside the grid.
        """
        self.check(config)
        units, by_layer = architectures.units(config), {}  # layer (None: whole model) → axis → size
        for key, unit in units.items():
            by_layer.setdefault(layer_of(key), {})[key.partition(".")[0]] = sizes.get(key, unit.size)
        total, known = self._part_seconds(REST, by_layer[None], context, phase), {}
        for layer, kind in enumerate(architectures.pattern(config)):
            values = {**by_layer[None], **by_layer.get(layer, {})}
            same = (kind, *map(id, values.values()))  # layers with the same size objects are interpolated once
            if same not in known:
                known[same] = self._part_seconds(kind, values, context, phase)
            total = total + known[same] * keep(layer)
        return total

    def _part_seconds(self, kind: str, sizes: Mapping, context: int, phase: str):
        """Seconds of one part; `sizes` maps each axis to a number or a tensor."""
        part = self.parts[kind]
        values = torch.tensor(getattr(part, phase), dtype=torch.float64)
        grid = (self.contexts, *part.grid)
        return interpolate(grid, values, [context, *(sizes[axis] for axis in part.axes)], ("context", *part.axes))


def interpolate(grid: Sequence[Sequence[int]], values: Tensor, sizes: Sequence, axes: Sequence[str]):
    """Interpolate `values` (*grid) at `sizes`, linearly in every size.

    Sizes are numbers, or tensors that broadcast together; if one is a tensor, the result is a tensor. The result is
    differentiable. At a point of the grid, the gradient is the slope above the point (at the last point, below it).
    Raises ConfigError for a size outside the grid; `axes` names the sizes in the message.
    """
    tensors = [size for size in sizes if isinstance(size, Tensor)]
    dtype = tensors[0].dtype if tensors else torch.float64
    sides = []  # for each axis, its two neighbouring points: (index, weight)
    for axis, points, size in zip(axes, grid, sizes, strict=True):
        size = torch.as_tensor(size, dtype=dtype)
        _check_range(axis, points, size.detach())
        if len(points) == 1:
            sides.append([(torch.tensor(0), 1)])
            continue
        nodes = torch.tensor(points, dtype=dtype)
        low = (torch.bucketize(size.detach(), nodes, right=True) - 1).clamp(0, len(points) - 2)
        share = (size - nodes[low]) / (nodes[low + 1] - nodes[low])
        sides.append([(low, 1 - share), (low + 1, share)])
    total = sum(
        values.to(dtype)[tuple(index for index, _ in corner)] * math.prod(weight for _, weight in corner)
        for corner in itertools.product(*sides)
    )
    return total if tensors else total.item()


def _check_range(axis: str, points: Sequence[int], size: Tensor) -> None:
    low, high = size.min().item(), size.max().item()
    if low < points[0] * (1 - ROUNDING) or high > points[-1] * (1 + ROUNDING):
        outside = low if low < points[0] * (1 - ROUNDING) else high
        raise ConfigError(
            f"{FIELDS.get(axis, axis)}: got {outside:g}; allowed: {points[0]} to {points[-1]}, the range of the table "
            f"of latencies; {REMEDY}, with these sizes in its choices"
        )


def shape_of(config) -> dict[str, dict[str, str]]:
    """The shapes on which the seconds depend in addition to the kept sizes.

    A text for the dimensions of every parameter, by kind of layer and parameter name; for a mixture of experts also
    the number of experts per token. Two parents with equal shapes can use the same table.
    """
    pattern, found = architectures.pattern(config), {}
    first = {pattern.index(kind): kind for kind in pattern}  # first layer of each kind
    for name, dims in architectures.parameter_layout(config).items():
        layer = layer_index(name)
        if layer is None:
            found.setdefault(REST, {})[name] = _dims_text(dims)
        elif layer in first:
            shapes = found.setdefault(first[layer], {})
            shapes[name.split(".", 3)[3]] = _dims_text(dims)
            if is_stack(dims):
                shapes["num_experts_per_tok"] = str(config.num_experts_per_tok)
    return found


def axes_of(config) -> dict[str, tuple[str, ...]]:
    """For every part (each kind of layer, and the rest): the axes on which its seconds depend."""
    pattern, found = architectures.pattern(config), {REST: ("hidden",)}
    for layer in sorted({pattern.index(kind) for kind in pattern}):
        layer_axes = (key.partition(".")[0] for key in architectures.units(config) if layer_of(key) == layer)
        found[pattern[layer]] = ("hidden", *layer_axes)
    return found


def _dims_text(dims: Sequence[Dim]) -> str:
    return ", ".join(map(_dim_text, dims))


def _dim_text(dim: Dim) -> str:
    match dim:
        case Fixed(size):
            return str(size)
        case Units(key, size, groups):
            return f"{key.partition('.')[0]} {size}" + (f" in {groups} groups" if groups > 1 else "")
        case Product(parts):
            return " × ".join(map(_dim_text, parts))
        case Concat(parts):
            return " + ".join(map(_dim_text, parts))
    raise AssertionError(dim)


def _tuples(values):
    """Nested lists as nested tuples."""
    return tuple(map(_tuples, values)) if isinstance(values, (list, tuple)) else values
