"""`elastic measure`: measures the seconds of every kind of layer on this device, at sizes from a profile's `choices`.

The result is a latency table, which elastic_core/cost/latency.py reads. It is written after all measurements. An
interrupted command writes nothing.

The measured models have one layer of each kind and random weights; layer_times.py times their layers. Before every
measured step, the reference model (the one with the parent's sizes) takes a step. A slow phase of the machine affects
both, so the median of their ratios can be compared between sizes.

In this module a *part* is a kind of layer, or the rest of a step (`REST`). A *point* is a tuple of sizes of a part, one
size per axis.
"""

import contextlib
import itertools
import random
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from elastic_core.config import ConfigError, require
from elastic_core.cost.budgets import family_setting
from elastic_core.cost.latency_table import FORMAT, REST, Table, axes_of, shape_of
from elastic_core.model import architectures
from elastic_core.model.axes import FIELDS
from elastic_core.model.submodel import Submodel
from elastic_core.search.choices import Choices
from elastic_core.search.space import ElasticSpace
from tasks.commands.layer_times import MeasureSetting, Models, timed_steps
from tasks.commands.plan import read_parent
from tasks.evaluation import latency_and_memory
from tasks.settings.load import read
from tasks.settings.local_checks import why_not_writable
from tasks.settings.merging import ROOT, file_of, parameters
from tasks.settings.profiles import working_directory

MEASURED = Path("profiles/measured")  # in the checkout; not in git, but not ignored either, so workspaces get it
DIGITS = 4  # significant digits of the seconds in the table


# --- what to measure -------------------------------------------------------------------------------------------------


def thin_out(sizes: Iterable[int], points: int) -> tuple[int, ...]:
    """At most `points` of `sizes`, in ascending order: the smallest, the largest and equally spaced ones between."""
    ordered = sorted(sizes)
    if len(ordered) <= points:
        return tuple(ordered)
    return tuple(ordered[round(i * (len(ordered) - 1) / (points - 1))] for i in range(points))


def grids(config, choices: Choices, points: int) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Part → the sizes to measure, one tuple per axis of the part.

    Raises ConfigError for choices that do not fit the parent.
    """
    space = ElasticSpace(config, choices, tuple(range(architectures.num_layers(config))))
    sizes = {slot.axis: thin_out(slot.sizes, points) for slot in space.axis_slots()}
    return {part: tuple(sizes[axis] for axis in axes) for part, axes in axes_of(config).items()}


@dataclass(frozen=True)
class Sample:
    """A model with one layer of each kind. `points` tells which point each of its parts measures."""

    submodel: Submodel
    points: dict[str, tuple[int, ...]]


def samples(config, grid: dict[str, tuple[tuple[int, ...], ...]]) -> list[Sample]:
    """A small set of models that together measure every point of every part."""
    axes, pattern = axes_of(config), architectures.pattern(config)
    kept, found = tuple(sorted(pattern.index(kind) for kind in axes if kind != REST)), []
    for hidden in grid[REST][0]:
        points = {part: [(hidden, *rest) for rest in itertools.product(*grid[part][1:])] for part in axes}
        for number in range(max(map(len, points.values()))):
            chosen = {part: choices[number % len(choices)] for part, choices in points.items()}
            widths = {
                FIELDS[axis]: size
                for part, sizes in chosen.items()
                for axis, size in zip(axes[part], sizes, strict=True)
            }
            found.append(Sample(Submodel(kept_layers=kept, **widths).resolve(config), chosen))
    return found


# --- the table -------------------------------------------------------------------------------------------------------


def measure(config, choices: Choices, setting: MeasureSetting) -> Table:
    """Measure every part of the parent `config` at every point, and show a progress bar. Raises ConfigError."""
    grid = grids(config, choices, setting.points)
    found, models = samples(config, grid), Models(config, setting)
    reference = models.build(Submodel(kept_layers=found[0].submodel.kept_layers).resolve(config))
    built = [(sample, models.build(sample.submodel)) for sample in found]
    reference_times: dict[tuple, list[float]] = {}  # (phase, context) → seconds of the reference
    ratios: dict[tuple, list[float]] = {}  # (phase, context, part, point) → seconds divided by the reference's
    with latency_and_memory.threads(setting.threads):
        for is_warm, context, (sample, model) in _rounds(built, setting):
            parts = [architectures.pattern(config)[layer] for layer in sample.submodel.kept_layers] + [REST]
            for phase, values, base in timed_steps(model, reference, setting, context):
                if is_warm:
                    reference_times.setdefault((phase, context), []).append(base)
                    for part, value in zip(parts, values, strict=True):
                        ratios.setdefault((phase, context, part, sample.points[part]), []).append(value)
    medians = {key: statistics.median(values) for key, values in reference_times.items()}
    # The table has seconds per step of decoding, but seconds per token of the prompt.
    scales = {(phase, n): s / (n * setting.batch if phase == "prefill" else 1) for (phase, n), s in medians.items()}
    seconds = {key: statistics.median(values) * scales[key[:2]] for key, values in ratios.items()}
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


def _rounds(built: list, setting: MeasureSetting) -> Iterator[tuple[bool, int, tuple]]:
    """Yield (whether the round counts, context, (sample, model)).

    Each round has every model at every context, in another order. The first round warms up and does not count.
    """
    with tqdm(total=(1 + setting.rounds) * len(built) * len(setting.contexts), desc="measure", unit="model") as bar:
        for number in range(1 + setting.rounds):
            order = list(itertools.product(setting.contexts, built))
            random.Random(number).shuffle(order)
            for context, model in order:
                yield number > 0, context, model
                bar.update()


def _nested(seconds: dict[tuple, float], phase: str, part: str, contexts, grid):
    """The seconds of a part as nested lists of shape (contexts, *sizes of each axis)."""

    def rows(context: int, point: tuple[int, ...], rest):
        if not rest:
            return float(f"{seconds[phase, context, part, point]:.{DIGITS}g}")
        return [rows(context, (*point, size), rest[1:]) for size in rest[0]]

    return [rows(context, (), grid) for context in contexts]


def environment(setting: MeasureSetting) -> dict:
    """The device, and the versions of Python and of the packages that were used."""
    found = latency_and_memory.environment()
    del found["lm_eval"]  # not used here
    return found | ({} if setting.device == "cpu" else {"device": torch.cuda.get_device_name(setting.device)})


# --- the command -----------------------------------------------------------------------------------------------------


def measure_profile(name: str, overrides: Iterable[str] = (), out: Path | None = None, **changes) -> tuple[Table, Path]:
    """Measure the layers of a profile's parent at the sizes in its choices, and write the table.

    name: the profile. overrides: ``section.key=value`` for its parameters.
    out: the file to write; None writes profiles/measured/PROFILE.json, which belongs to this machine and not to git.
    changes: fields of `MeasureSetting`. A field that is missing or None has the profile's value: the contexts of its
        budgets and of its evaluation, the batch of its budgets (or 1), the threads of its evaluation. Contexts in
        `changes` are measured in addition.

    Returns the table and its file. The profile's own table may still be missing. Raises ConfigError or UserError for
    what the user has to change.
    """
    values, where = parameters(name, overrides=overrides), file_of(name)
    out = ROOT / MEASURED / f"{name}.json" if out is None else out.absolute()
    reason = why_not_writable(out.parent)
    require(
        reason is None and not out.is_dir(), "out", str(out), f"a file that can be written; {reason or 'a directory'}"
    )
    with contextlib.chdir(working_directory(name, overrides=overrides)):  # as in a run
        settings = read(values, where)
        config, source = read_parent(settings)
    _check_same_parent(out, config)
    serving, evaluation = family_setting(settings.cost, settings.budgets), settings.evaluate.latency
    device = changes.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    fields = {
        "contexts": tuple(sorted({evaluation.prompt_tokens, serving.get("context", evaluation.prompt_tokens)})),
        "batch": serving.get("batch", 1),
        "threads": evaluation.threads,
        "device": device,
        "dtype": "float32" if device == "cpu" else "bfloat16",
    }
    if changes.get("contexts"):
        changes["contexts"] = tuple(sorted({*fields["contexts"], *changes["contexts"]}))
    setting = MeasureSetting(**fields | {key: value for key, value in changes.items() if value is not None})
    try:
        table = measure(config, settings.choices, setting)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{where} ({source}): {problem}" for problem in error.problems)) from None
    table.save(out)
    return table, out


def _check_same_parent(out: Path, config) -> None:
    """Raise ConfigError if `out` holds the table of another parent, because another profile may need that table."""
    if not out.is_file():
        return
    try:
        Table.load(out).check(config)
    except ConfigError:
        allowed = "another file, by --out FILE and cost.table, because this one holds the table of another parent"
        raise ConfigError(f"out: got {str(out)!r}; allowed: {allowed}") from None


def describe(table: Table, path: Path) -> str:
    """A summary of the table: the seconds of every part at the parent's sizes and the longest context."""
    lines = [f"{path}: {table.batch} × {table.contexts[-1]:,} tokens, {table.dtype} on {table.environment['device']}"]
    for kind, part in table.parts.items():
        decode, prefill = (seconds[-1] for seconds in (part.decode, part.prefill))
        for _ in part.axes:
            decode, prefill = decode[-1], prefill[-1]
        largest = ", ".join(f"{axis} {points[-1]}" for axis, points in zip(part.axes, part.grid, strict=True))
        lines.append(
            f"  {kind:5} {decode * 1e3:8.4f} ms a step, {prefill * 1e6:8.3f} µs a token of the prompt ({largest})"
        )
    named = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    lines.append(f"To count budgets with it, set in a profile, or by --set:  cost: {{metric: latency, table: {named}}}")
    return "\n".join(lines)
