"""Tables of latencies that nobody measured: seconds by a formula over any parent's layers, for tests."""

import itertools

from elastic_core.cost.latency_table import FORMAT, REST, Table, axes_of, shape_of
from elastic_core.model import architectures
from elastic_core.model.axes import FIELDS

CONTEXTS = (16, 64)


def seconds_of(kind: str, sizes: dict[str, int], context: int) -> float:
    """Rising in every size, not linearly, and differently for every kind; attention's grows with the context."""
    reads = context if "attention_heads" in sizes else 0
    work = sum((1 + place) * size**1.3 for place, (_, size) in enumerate(sorted(sizes.items())))
    return 1e-6 * (20 + len(kind) + work + 0.2 * reads)


def make_table(config, points: dict[str, tuple[int, ...]] | None = None, **changes) -> Table:
    """`points`: ascending sizes of axes by their names in params.yaml; an axis that is left out has half and full."""
    full = {key.partition(".")[0]: unit.size for key, unit in architectures.units(config).items()}
    named = {
        axis: tuple((points or {}).get(FIELDS[axis], (size // 2, size) if size > 1 else (1,)))
        for axis, size in full.items()
    }
    parts = {}
    for kind, axes in axes_of(config).items():
        grid = [named[axis] for axis in axes]

        def rows(context, done=(), kind=kind, axes=axes, grid=grid):
            if len(done) == len(grid):
                return seconds_of(kind, dict(zip(axes, done, strict=True)), context)
            return [rows(context, (*done, size)) for size in grid[len(done)]]

        decode = [rows(context) for context in CONTEXTS]
        parts[kind] = {"axes": axes, "grid": grid, "decode": decode, "prefill": decode}
    values = {"contexts": CONTEXTS, "batch": 1, "dtype": "float32", "device": "cpu", "threads": 1}
    values |= {"environment": {"device": "none"}, "shape": shape_of(config), "parts": parts, "format": FORMAT}
    return Table.from_json(values | changes)


def points_of(table: Table, kind: str):
    """Every point of a part's grid, as sizes by axis."""
    part = table.parts[kind]
    for point in itertools.product(*part.grid):
        yield dict(zip(part.axes, point, strict=True))


__all__ = ["CONTEXTS", "REST", "make_table", "points_of", "seconds_of"]
