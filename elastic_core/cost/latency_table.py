"""A table of seconds that were measured once, on the device that is to serve: what latency.py counts with.

It has the seconds of every kind of layer, alone, over a grid of its sizes, and of the rest of a step
(embeddings, final norm, head, what the step itself takes) over hidden sizes. A model takes the sum over its kept
layers and the rest: between the grid's points interpolated linearly, in every size and in the context. `elastic
profile` measures it (tasks/commands/measure.py).
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
from elastic_core.model import architectures
from elastic_core.model.axes import FIELDS
from elastic_core.model.dims import Concat, Dim, Fixed, Product, Units, is_stack, layer_index, layer_of

FORMAT = 1  # of files
REST = "rest"  # what is no layer's
ROUNDING = 1e-5  # by which an expected size may leave the grid
REMEDY = "measure it again with `elastic profile PROFILE`"


@dataclass(frozen=True)
class Part:
    """Seconds of one kind of layer, or of the rest, over a grid of sizes.

    `axes` names the dimensions of the grid, hidden first, and `grid` has their sizes, ascending. Nested (contexts,
    *grid): `decode` of a step that generates one token for every sequence, `prefill` of reading a token of a prompt.
    """

    axes: tuple[str, ...]
    grid: tuple[tuple[int, ...], ...]
    decode: tuple
    prefill: tuple

    @classmethod
    def read(cls, values: Mapping, contexts: Sequence[int]) -> Part:
        """Of plain values; ValueError where they do not have the grid's shape, or are not above zero."""
        part = cls(*(_tuples(values[name]) for name in ("axes", "grid", "decode", "prefill")))
        shape = (len(contexts), *map(len, part.grid))
        for seconds in (part.decode, part.prefill):
            found = torch.tensor(seconds, dtype=torch.float64)
            if found.shape != shape or not (found > 0).all():
                raise UserError(f"seconds of shape {tuple(found.shape)}; expected {shape}, all above 0")
        if len(part.axes) != len(part.grid) or any(list(points) != sorted(set(points)) for points in part.grid):
            raise UserError("a grid whose sizes do not ascend")
        return part


@dataclass(frozen=True)
class Table:
    """What was measured: `parts` by kind of layer (its character in the pattern), for `batch` sequences at `contexts`.

    `shape` describes the parent's layers, see `shape_of`; `environment` the machine and the versions, for people.
    `threads` are of a CPU.
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
        """Of plain values. Raises ValueError for what is no table of this format."""
        try:
            fields = dict(values)
            if fields.pop("format") != FORMAT:
                raise UserError(f"not of format {FORMAT}")
            fields["contexts"] = _tuples(fields["contexts"])
            parts = {kind: Part.read(part, fields["contexts"]) for kind, part in fields.pop("parts").items()}
            return cls(parts=parts, **fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"no table of latencies ({type(error).__name__}: {error})") from None

    @classmethod
    def load(cls, path: str | os.PathLike, where: str = "cost.table") -> Table:
        """Of a file that `save` wrote. Raises ConfigError where it is not there, or is something else."""
        allowed = "a file that `elastic profile PROFILE` writes, on the device that is to serve"
        if not Path(path).is_file():
            raise ConfigError(f"{where}: got {str(path)!r}, which is not there; allowed: {allowed}")
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except ValueError as error:
            raise ConfigError(f"{where}: got {str(path)!r}, which is {error}; allowed: {allowed}") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write a file, whole or not at all."""
        write_text(path, json.dumps(self.to_json()) + "\n")

    def to_json(self) -> dict:
        """What `from_json` reads."""
        return {"format": FORMAT, **asdict(self)}

    def check(self, config) -> None:
        """Raise ConfigError for a parent of another shape than this was measured for."""
        for kind, shapes in shape_of(config).items():
            known = self.shape.get(kind, {})
            for name in {**shapes, **known}:
                if known.get(name) != shapes.get(name):
                    kind_text = "" if kind == REST else f"layers {kind}, "
                    raise ConfigError(
                        f"cost.table: measured for {kind_text}{name} of {known.get(name, 'no size at all')}, where the "
                        f"parent has {shapes.get(name, 'none')}; allowed: a table of this parent; {REMEDY}"
                    )

    def seconds(self, config, sizes: Mapping, keep: Callable[[int], object], context: int, phase: str = "decode"):
        """Seconds of a step of decoding for the whole batch, or (`phase` prefill) of a token of the prompt.

        `sizes` and `keep` are as in cost.py: numbers, or tensors of shapes that broadcast together.
        Raises ConfigError for another parent's sizes, and for such as lie outside of the grid.
        """
        self.check(config)
        units, own = architectures.units(config), {}
        for key, unit in units.items():
            own.setdefault(layer_of(key), {})[key.partition(".")[0]] = sizes.get(key, unit.size)
        total, known = self._part(REST, own[None], context, phase), {}
        for layer, kind in enumerate(architectures.pattern(config)):
            values = {**own[None], **own.get(layer, {})}
            alike = (kind, *map(id, values.values()))  # layers that are cut alike are looked up once
            if alike not in known:
                known[alike] = self._part(kind, values, context, phase)
            total = total + known[alike] * keep(layer)
        return total

    def _part(self, kind: str, sizes: Mapping, context: int, phase: str):
        part = self.parts[kind]
        values = torch.tensor(getattr(part, phase), dtype=torch.float64)
        grid = (self.contexts, *part.grid)
        return interpolate(grid, values, [context, *(sizes[axis] for axis in part.axes)], ("context", *part.axes))


def interpolate(grid: Sequence[Sequence[int]], values: Tensor, sizes: Sequence, axes: Sequence[str]):
    """`values` (*grid) between the points of the grid, linear in every size: a number, or a tensor where a size is one.

    Sizes are numbers, or tensors that broadcast together. Differentiable; at a point the slope is that above it, at the
    last one that below. Raises ConfigError for a size outside of its points.
    """
    tensors = [size for size in sizes if isinstance(size, Tensor)]
    dtype = tensors[0].dtype if tensors else torch.float64
    sides = []
    for axis, points, size in zip(axes, grid, sizes, strict=True):
        size = torch.as_tensor(size, dtype=dtype)
        _check_range(axis, points, size.detach())
        if len(points) == 1:
            sides.append([(torch.tensor(0), 1)])
            continue
        knots = torch.tensor(points, dtype=dtype)
        low = (torch.bucketize(size.detach(), knots, right=True) - 1).clamp(0, len(points) - 2)
        share = (size - knots[low]) / (knots[low + 1] - knots[low])
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
            f"{FIELDS.get(axis, axis)}: got {outside:g}; allowed: {points[0]} to {points[-1]}, where the table of "
            f"latencies was measured; {REMEDY}, with these sizes in its choices"
        )


def shape_of(config) -> dict[str, dict[str, str]]:
    """What seconds depend on besides kept sizes: every parameter's dimensions in words, by kind of layer.

    And, of experts, how many a token is sent to.
    """
    pattern, found = architectures.pattern(config), {}
    first = {pattern.index(kind): kind for kind in pattern}
    for name, dims in architectures.parameter_layout(config).items():
        layer = layer_index(name)
        if layer is None:
            found.setdefault(REST, {})[name] = _in_words(dims)
        elif layer in first:
            of_kind = found.setdefault(first[layer], {})
            of_kind[name.split(".", 3)[3]] = _in_words(dims)
            if is_stack(dims):  # of which a token's are run
                of_kind["num_experts_per_tok"] = str(config.num_experts_per_tok)
    return found


def axes_of(config) -> dict[str, tuple[str, ...]]:
    """The axes that a part's seconds depend on, by kind of layer, and of the rest."""
    pattern, found = architectures.pattern(config), {REST: ("hidden",)}
    for layer in sorted({pattern.index(kind) for kind in pattern}):
        own = (key.partition(".")[0] for key in architectures.units(config) if layer_of(key) == layer)
        found[pattern[layer]] = ("hidden", *own)
    return found


def _in_words(dims: Sequence[Dim]) -> str:
    return ", ".join(map(_dim_in_words, dims))


def _dim_in_words(dim: Dim) -> str:
    match dim:
        case Fixed(size):
            return str(size)
        case Units(key, size, groups):
            return f"{key.partition('.')[0]} {size}" + (f" in {groups} groups" if groups > 1 else "")
        case Product(parts):
            return " × ".join(map(_dim_in_words, parts))
        case Concat(parts):
            return " + ".join(map(_dim_in_words, parts))
    raise AssertionError(dim)


def _tuples(values):
    """Nested lists as nested tuples."""
    return tuple(map(_tuples, values)) if isinstance(values, (list, tuple)) else values
