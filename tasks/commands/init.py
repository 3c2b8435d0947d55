"""`elastic init`: writes a profile for a parent and corpora of the user, with choices that the parent can give.

It reads the parent's config.json and the first document of every corpus, but no weights. The profile is checked as
`python -m tasks.commands.check` checks it before it is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch

from elastic_core.config import ConfigError, require
from elastic_core.cost.budgets import Spelling, parse
from elastic_core.cost.metrics import num_parameters
from elastic_core.errors import UserError
from elastic_core.io import storage
from elastic_core.io.atomic import write_text
from elastic_core.model import architectures
from elastic_core.model.axes import FIELDS
from elastic_core.search.importance.methods import BASES
from tasks.commands import check
from tasks.commands.init_profile import Profile, Source, Training, text_of
from tasks.commands.plan import find_members
from tasks.corpora.text_sources import Files
from tasks.parents.config import read_config
from tasks.parents.hub import HubModel
from tasks.parents.targets import resolve
from tasks.settings import merging
from tasks.settings.load import read
from tasks.settings.local_checks import check_parent
from tasks.settings.paths import is_hub_name
from tasks.settings.yaml_files import parse as parse_yaml

BUDGETS = {"full": 1.0, "medium": 0.75, "small": 0.5}
CHARACTERS_PER_TOKEN = 3.5  # an estimate, for tokenizers of about 100,000 tokens on English
HELD_OUT_CHARACTERS = 400_000  # enough for a stable held-out loss
REPEATS = 4  # times that training reads the data at most; more teaches little that is new
TOKENS_ON_GPU, TOKENS_ON_CPU = 200_000_000, 1_000_000  # of stage 1, at most; stage 2 has half of them
MOST_COMBINATIONS = 200_000  # of choices; all are compared
# Finer and finer, until the budgets can be met: sizes per axis, and what sizes are multiples of, relative to the usual.
RESOLUTIONS = ((5, 1.0), (7, 0.5), (9, 0.25), (13, 0.125), (17, 0.0))


def init(
    parent: str | Path,
    data: Iterable[str],
    budgets: Mapping[str, Spelling] | None = None,
    name: str | None = None,
    text_field: str = "text",
    force: bool = False,
    root: Path = merging.ROOT,
) -> Path:
    """Write profiles/NAME.yaml for a parent and the text files that the globs `data` match.

    `parent` is a local directory or a name on the hub. Raises UserError for a parent, a corpus or a budget that cannot
    be used, and for an existing profile without `force`. Then nothing is written.
    """
    parent = str(parent)
    name = name or re.sub(r"[^\w.-]+", "-", name_of(parent)).strip("-.").lower()
    fits = re.fullmatch(r"\w[\w.-]*", name) is not None and name != "default"
    require(fits, "--name", name, "letters, digits, - and _, but not default")
    path = root / "profiles" / f"{name}.yaml"
    if path.exists() and not force:
        raise UserError(f"{path}: exists; choose another --name, or replace it with --force")
    if not is_hub_name(parent):
        check_parent(str(Path(parent).absolute()), "DIR")
    config = read_config(parent)
    sources, characters = read_sources(data, text_field, root)
    budgets = dict(budgets or BUDGETS)
    kinds = {parse(given, f"budgets.{budget}").kind for budget, given in budgets.items()}
    timed = kinds & {"latency", "throughput"}
    require(
        not timed, "--budget", ", ".join(map(str, budgets.values())), "shares, counts or memory: time needs a table"
    )
    gpus = 1 if torch.cuda.is_available() else 0
    written = new_profile(
        parent=parent if is_hub_name(parent) else as_written(parent, root),
        config=config,
        budgets=budgets,
        sources=sources,
        **lengths(config, sources, characters, len(budgets), gpus),
        gpus=gpus,
    )
    text = with_choices(written, config, root, check.check)
    write_text(path, text)
    return path


def name_of(parent: str) -> str:
    """The name of a parent without its owner or the directory that it is in."""
    return HubModel.parse(parent).name.partition("/")[2] if is_hub_name(parent) else Path(parent).resolve().name


def new_profile(parent: str, config, budgets: Mapping[str, Spelling], **values) -> Profile:
    """A profile without choices (see `with_choices`) for a parent with this configuration; `values`: other fields."""
    return Profile(
        parent=parent,
        description=f"{name_of(parent)}: {num_parameters(config):,} parameters, {config.model_type}",
        budgets=budgets,
        metric="memory" if "bytes" in {parse(given).kind for given in budgets.values()} else "parameters",
        choices={},
        basis="channels" if config.tie_word_embeddings else BASES[0],
        dtype="bfloat16" if str(config.dtype).endswith(("bfloat16", "float16")) else "float32",
        **values,
    )


def as_written(path: str, root: Path) -> str:
    """A path for a profile: as it was given where it is found from the checkout, otherwise absolute."""
    given = Path(path)
    return path if storage.is_url(path) or given.is_absolute() or Path.cwd() == root else str(given.absolute())


# --- data ------------------------------------------------------------------------------------------------------------


def read_sources(data: Iterable[str], text_field: str, root: Path) -> tuple[dict[str, Source], int]:
    """Name → corpus, and the number of characters of the smallest one times their number (they are mixed equally)."""
    sources, sizes = {}, []
    for pattern in data:
        path = as_written(pattern, root)
        files = Files(path=path, text_field=text_field)
        with contextlib.chdir(root):
            try:
                size = files.expected_characters()
                next(files.texts(0), None)  # the first document; its error says what is wrong with the files
            except UserError as error:
                hint = "; name the field with --text-field" if "set text_field" in str(error) else ""
                raise UserError(f"--data: {error}{hint}") from None
        held_out = min(0.1, max(0.001, HELD_OUT_CHARACTERS / max(1, size)))
        sources[_unused_name(pattern, sources)] = Source(path, text_field, float(f"{held_out:.1g}"))
        sizes.append(size)
    require(bool(sources), "--data", list(sources), "one glob or more, such as 'corpus/*.jsonl'")
    return sources, min(sizes) * len(sizes)


def _unused_name(pattern: str, taken: Iterable[str]) -> str:
    """A name for a corpus: that of its first folder or file without wildcards, from the right."""
    parts = [part for part in reversed(Path(pattern).with_suffix("").parts) if not set(part) & set("*?[]/")]
    name = re.sub(r"\W+", "_", parts[0] if parts else "text").strip("_") or "text"
    number = 1
    while (found := name if number == 1 else f"{name}_{number}") in taken:
        number += 1
    return found


def lengths(config, sources: Mapping[str, Source], characters: int, num_budgets: int, gpus: int) -> dict:
    """The training stages, and the tokens for them and for evaluation, from the size of parent and data."""
    tokens = max(1, int(characters / CHARACTERS_PER_TOKEN))
    longest = getattr(config, "max_position_embeddings", None) or 2**20
    short = _power_of_two(min(2048 if gpus else 256, longest, tokens // 64))
    extended = _power_of_two(min(4 * short, longest, tokens // 16))
    rate = min(1e-3, max(3e-5, 1e-4 * (1e9 / num_parameters(config)) ** 0.25))
    most = min(TOKENS_ON_GPU if gpus else TOKENS_ON_CPU, REPEATS * tokens)
    microbatches, workers = num_budgets * max(1, 4 // gpus if gpus else 1), max(1, gpus)
    sizes = (
        (short, microbatches * workers * (4 if gpus else 2), most, rate),
        (extended, microbatches * workers, most // 2, rate / 2),
    )
    stages = [
        Training(length, batch, microbatches, min(5000, max(20, total // (length * batch))), lr)
        for length, batch, total, lr in sizes
    ]
    return {
        "tokens": tokens,
        "held_out_tokens": int(tokens / len(sources) * min(source.held_out for source in sources.values())),
        "short": stages[0],
        "extended": stages[1],
    }


def _power_of_two(limit: int) -> int:
    """The largest power of two up to `limit`, 8 or more."""
    return 2 ** max(3, int(math.log2(max(1, limit))))


# --- choices ---------------------------------------------------------------------------------------------------------


def with_choices(
    profile: Profile,
    config,
    root: Path,
    check: Callable[[Mapping], None],
    changes: Iterable[tuple[list[str], object]] = (),
) -> str:
    """The text of the profile with choices that can meet the budgets, and that `check` accepts as parameters.

    changes: (path, value) of parameters that a run will have instead of the profile's (see `merging.merged`). The
    choices are made for them, but the text does not have them.

    Raises ConfigError if there are none.
    """
    changes = list(changes)
    try:
        with contextlib.chdir(root):
            own_sizes = {"depth": (architectures.num_layers(config),)}  # any choices do: targets depend on none
            settings = read(_values(profile, own_sizes, root, changes))
            smallest = min(resolve(settings, config).values())
        tries = [(choices, True) for choices in possible_choices(config, smallest)]
        if settings.choices.heterogeneous:  # by a change; to find mixed layers takes long, so only the finest sizes
            tries.append((tries[-1][0], False))
        return _first_that_fits(profile, config, root, check, changes, tries)
    except ConfigError as error:
        raise ConfigError("\n".join(problem.removeprefix("params.yaml: ") for problem in error.problems)) from None


def _first_that_fits(profile: Profile, config, root: Path, check, changes: list, tries: list) -> str:
    """`with_choices` for the first of `tries` that can be: (choices, whether all layers have the same sizes)."""
    error = None
    for choices, is_uniform in tries:
        values = _values(profile, choices, root, changes)
        with contextlib.chdir(root):
            try:
                settings = read(values)
                if is_uniform:
                    uniform = dataclasses.replace(settings.choices, heterogeneous=())
                    settings = dataclasses.replace(settings, choices=uniform)
                find_members(settings, config, resolve(settings, config))
                check(values)
            except ConfigError as found:
                error = found
            else:
                return text_of(dataclasses.replace(profile, choices=choices))
    raise error


def _values(profile: Profile, choices: Mapping[str, tuple[int, ...]], root: Path, changes: list):
    """The content of params.yaml with the profile, these choices and the changes."""
    text = text_of(dataclasses.replace(profile, choices=choices))
    return merging.merged(parse_yaml(text, "profile"), root, changes=changes)


def possible_choices(config, smallest: float) -> Iterator[dict[str, tuple[int, ...]]]:
    """Sizes of every axis of the parent, from few to many, then from smaller ones on.

    smallest: the smallest target, as a share of the parent's cost.
    """
    lowest = max(0.2, 0.8 * smallest)
    # Lower where an axis is fixed, such as the hidden size of qwen2: the other axes have to give more.
    for least_width, least_depth in ((lowest, (1 + lowest) / 2), (0.6 * lowest, lowest)):
        for count, coarseness in RESOLUTIONS:
            yield choices_of(config, least_width, count, coarseness, least_depth)


def choices_of(config, lowest: float, count: int, coarseness: float, lowest_depth: float) -> dict[str, tuple[int, ...]]:
    """Field of section `choices` → at most `count` sizes, from the parent's down to its share `lowest`.

    For the number of layers, `lowest_depth` is that share.

    coarseness: 1 makes sizes multiples of 64 where they are large, as fast kernels want it; 0 allows every size that
    the architecture allows.
    """
    found, units = {}, architectures.units(config)
    by_axis = {unit.key.partition(".")[0]: unit for unit in units.values()}
    heads = _head_choices(config, by_axis.get("attention_heads"), lowest)
    for axis, unit in by_axis.items():
        field = FIELDS[axis]
        step = unit.groups
        if field == "hidden_size":
            step = math.lcm(*heads) if config.model_type == "llama" else 1
            step = math.lcm(step, 8) if architectures.has_experts(config) and unit.size % 8 == 0 else step
        if field == "moe_intermediate_size" and unit.size % 8 == 0:
            step = 8
        if field == "num_attention_heads" and heads:
            found[field] = heads
            continue
        least = max(unit.least, math.ceil(lowest * unit.size))
        found[field] = ladder(unit.size, least, step, count, coarseness)
        if field == "hidden_size" and heads:
            found[field] = tuple(size for size in found[field] if all(_can_be_written(config, size, n) for n in heads))
    layers = architectures.num_layers(config)
    found["depth"] = ladder(layers, math.ceil(lowest_depth * layers), 1, min(count, 6), 0)
    while math.prod(map(len, found.values())) > MOST_COMBINATIONS:
        longest = max(found, key=lambda field: len(found[field]))
        found[longest] = found[longest][::2]
    return {field: found[field] for field in (*FIELDS.values(), "depth") if field in found}


def _head_choices(config, unit, lowest: float) -> tuple[int, ...]:
    """Numbers of query heads that go with the parent's hidden size."""
    if unit is None:
        return ()
    sizes = [size for size in range(unit.size, 0, -unit.groups) if size >= lowest * unit.size]
    return tuple([size for size in sizes if _can_be_written(config, config.hidden_size, size)][:3])


def _can_be_written(config, hidden_size: int, num_heads: int) -> bool:
    return architectures.of(config).size_problem(config, hidden_size, num_heads) is None


def ladder(full: int, least: int, step: int, count: int, coarseness: float) -> tuple[int, ...]:
    """At most `count` different sizes from `full` down to about `least`, largest first, in multiples of `step`."""
    preferred = next((size for limit, size in ((1024, 64), (256, 16), (64, 8)) if full >= limit), 1)
    coarse = max(1, round(preferred * coarseness))
    multiple = math.lcm(step, coarse)
    if multiple > max(coarse, (full - least) / max(1, count - 1)):
        multiple = step
    wanted = (full - i * (full - least) / max(1, count - 1) for i in range(1, count))
    sizes = {round(size / multiple) * multiple for size in wanted}
    return (full, *sorted((size for size in sizes if least <= size < full), reverse=True))
