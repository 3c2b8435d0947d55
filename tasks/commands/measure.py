"""`elastic profile`: seconds of every kind of layer, at sizes that a profile's `choices` allow, on the device at hand.

Models of transformers with one layer of each kind and random weights decode with a cache; hooks mark where layers
begin. Every step is followed by one of the largest such model, so that a slow spell of the machine meets both, and what
is compared between sizes is the median of these ratios. The table is written when all is measured, whole or not at all,
for `elastic_core/cost/latency.py` to read.
"""

import itertools
import random
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from elastic_core.config import ConfigError, require
from elastic_core.config import load as load_section
from elastic_core.cost.budgets import Cost, family_setting
from elastic_core.cost.latency import TIMED
from elastic_core.cost.latency_table import FORMAT, REST, Table, axes_of, shape_of
from elastic_core.model import architectures
from elastic_core.model.axes import FIELDS
from elastic_core.model.submodel import Submodel
from elastic_core.search.choices import Choices
from elastic_core.search.space import ElasticSpace
from tasks.commands.layer_times import Models, Setting, turns
from tasks.commands.plan import read_parent
from tasks.evaluation import latency_and_memory
from tasks.settings.profiles import ROOT, parameters
from tasks.settings.schema import Evaluate, Parent, PrepareData

DIGITS = 4  # of seconds in the table


# --- what to measure -------------------------------------------------------------------------------------------------


def thinned(sizes: Iterable[int], points: int) -> tuple[int, ...]:
    """The largest and the smallest of `sizes`, and some between them, as evenly as they stand; ascending."""
    ordered = sorted(sizes)
    if len(ordered) <= points:
        return tuple(ordered)
    return tuple(ordered[round(i * (len(ordered) - 1) / (points - 1))] for i in range(points))


def grids(config, choices: Choices, points: int) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Where every part is measured: sizes of its axes. Raises ConfigError for choices that are not the parent's."""
    space = ElasticSpace(config, choices, tuple(range(architectures.num_layers(config))))
    sizes = {slot.axis: thinned(slot.sizes, points) for slot in space.axis_slots()}
    return {part: tuple(sizes[axis] for axis in axes) for part, axes in axes_of(config).items()}


@dataclass(frozen=True)
class Sample:
    """A model with one layer of each kind, and the point of the grid that each of its parts stands for."""

    submodel: Submodel
    points: dict[str, tuple[int, ...]]


def samples(config, grid: dict[str, tuple[tuple[int, ...], ...]]) -> list[Sample]:
    """As few models as measure every point of every part."""
    axes, pattern = axes_of(config), architectures.pattern(config)
    kept, found = tuple(sorted(pattern.index(kind) for kind in axes if kind != REST)), []
    for hidden in grid[REST][0]:
        points = {part: [(hidden, *rest) for rest in itertools.product(*grid[part][1:])] for part in axes}
        for number in range(max(map(len, points.values()))):
            chosen = {part: these[number % len(these)] for part, these in points.items()}
            widths = {
                FIELDS[axis]: size
                for part, sizes in chosen.items()
                for axis, size in zip(axes[part], sizes, strict=True)
            }
            found.append(Sample(Submodel(kept_layers=kept, **widths).resolve(config), chosen))
    return found


# --- the table -------------------------------------------------------------------------------------------------------


def measure(config, choices: Choices, setting: Setting) -> Table:
    """Measure all of it; shows its progress."""
    grid = grids(config, choices, setting.points)
    todo, models = samples(config, grid), Models(config, setting)
    reference = models.build(Submodel(kept_layers=todo[0].submodel.kept_layers).resolve(config))
    built = [(sample, models.build(sample.submodel)) for sample in todo]
    bases: dict[tuple, list[float]] = {}  # (phase, context) → seconds of the reference
    ratios: dict[tuple, list[float]] = {}  # (phase, context, part, point) → seconds over the reference's
    with latency_and_memory.threads(setting.threads):
        for is_warm, context, (sample, model) in _rounds(built, setting):
            parts = [architectures.pattern(config)[layer] for layer in sample.submodel.kept_layers] + [REST]
            for phase, values, base in turns(model, reference, setting, context):
                if is_warm:
                    bases.setdefault((phase, context), []).append(base)
                    for part, value in zip(parts, values, strict=True):
                        ratios.setdefault((phase, context, part, sample.points[part]), []).append(value)
    usual = {key: statistics.median(values) for key, values in bases.items()}
    usual = {(phase, n): s / (n * setting.batch if phase == "prefill" else 1) for (phase, n), s in usual.items()}
    seconds = {key: statistics.median(values) * usual[key[:2]] for key, values in ratios.items()}
    parts = {
        part: {
            "axes": axes_of(config)[part],
            "grid": grid[part],
            **{phase: _nested(seconds, phase, part, setting.contexts, grid[part]) for phase in ("decode", "prefill")},
        }
        for part in grid
    }
    fields = {name: getattr(setting, name) for name in ("contexts", "batch", "dtype", "device", "threads")}
    values = {
        "format": FORMAT,
        **fields,
        "environment": environment(setting),
        "shape": shape_of(config),
        "parts": parts,
    }
    return Table.from_json(values)


def _rounds(built: list, setting: Setting) -> Iterator[tuple[bool, int, tuple]]:
    """Every model at every context, once a round, each round in another order; and whether it counts: one warms up."""
    with tqdm(total=(1 + setting.rounds) * len(built) * len(setting.contexts), desc="profile", unit="model") as bar:
        for number in range(1 + setting.rounds):
            order = list(itertools.product(setting.contexts, built))
            random.Random(number).shuffle(order)
            for context, model in order:
                yield number > 0, context, model
                bar.update()


def _nested(seconds: dict[tuple, float], phase: str, part: str, contexts, grid):
    """The seconds of a part as lists, (contexts, *grid)."""

    def rows(context: int, point: tuple[int, ...], rest):
        if not rest:
            return float(f"{seconds[phase, context, part, point]:.{DIGITS}g}")
        return [rows(context, (*point, size), rest[1:]) for size in rest[0]]

    return [rows(context, (), grid) for context in contexts]


def environment(setting: Setting) -> dict:
    """Where and with what the seconds were measured."""
    found = latency_and_memory.environment()
    del found["lm_eval"]  # which has no part in it
    return found | ({} if setting.device == "cpu" else {"device": torch.cuda.get_device_name(setting.device)})


# --- the command -----------------------------------------------------------------------------------------------------


def profile(name: str, overrides: Iterable[str] = (), out: Path | None = None, **changes) -> tuple[Table, Path]:
    """Measure what a profile's parent and choices ask for; the table, and where it was written: `out`, or cost.table.

    `changes` are fields of `Setting`; what is None, or left out, is as the profile says: the contexts of its budgets
    and of its evaluation (to which those of `changes` are added), one sequence if nothing says how many, and the
    evaluation's threads. Of params.yaml only the sections that matter are read: that there is no table yet is no error.
    Raises ConfigError for what is to be changed.
    """
    values, where = parameters(name, overrides=overrides), f"profile {name}"
    kinds = {"parent": Parent, "prepare_data": PrepareData, "choices": Choices, "cost": Cost}
    kinds["evaluate"] = Evaluate
    read = SimpleNamespace(**{k: load_section(kind, values.get(k) or {}, f"{where}: {k}") for k, kind in kinds.items()})
    said, measured = family_setting(read.cost, values["budgets"]), read.evaluate.latency
    has_own = out is None
    if has_own:
        allowed = "a file, --out FILE: the profile's own cost.table is for another metric than latency and throughput"
        require(read.cost.metric in TIMED, "out", None, allowed)
        out = ROOT / read.cost.table
    config, source = read_parent(read)
    if has_own:
        _check_replaced(out, config)
    device = changes.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    fields = {
        "contexts": tuple(sorted({measured.prompt_tokens, said.get("context", measured.prompt_tokens)})),
        "batch": said.get("batch", 1),
        "threads": measured.threads,
        "device": device,
        "dtype": "float32" if device == "cpu" else "bfloat16",
    }
    if changes.get("contexts"):
        changes["contexts"] = tuple(sorted({*fields["contexts"], *changes["contexts"]}))
    setting = Setting(**fields | {key: value for key, value in changes.items() if value is not None})
    try:
        table = measure(config, read.choices, setting)
    except ConfigError as error:
        raise ConfigError(f"{where} ({source}): {error}") from None
    table.save(out)
    return table, out


def _check_replaced(out: Path, config) -> None:
    """Refuse to write over another parent's table, of which only its own profile knows. Raises ConfigError."""
    if not out.is_file():
        return
    try:
        Table.load(out).check(config)
    except ConfigError:
        allowed = "another file, by --out FILE and cost.table: this one is another parent's"
        raise ConfigError(f"out: got {str(out)!r}; allowed: {allowed}") from None


def describe(table: Table, path: Path) -> str:
    """What was written, for people: the parent's parts at the longest context."""
    lines = [f"{path}: {table.batch} × {table.contexts[-1]:,} tokens, {table.dtype} on {table.environment['device']}"]
    for kind, part in table.parts.items():
        decode, prefill = (seconds[-1] for seconds in (part.decode, part.prefill))
        for _ in part.axes:
            decode, prefill = decode[-1], prefill[-1]
        sizes = ", ".join(f"{axis} {points[-1]}" for axis, points in zip(part.axes, part.grid, strict=True))
        lines.append(
            f"  {kind:5} {decode * 1e3:8.4f} ms a step, {prefill * 1e6:8.3f} µs a token of the prompt ({sizes})"
        )
    return "\n".join(lines)
