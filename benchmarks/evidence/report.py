"""Writes the comparison of arms: a Markdown page, its numbers as JSON, and a chart."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.evidence import plot, tables
from benchmarks.evidence.arms import Arm
from benchmarks.evidence.intervals import Estimate, Tokens, estimate
from benchmarks.evidence.jobs import Job, Plan
from benchmarks.evidence.tables import MEASURES, Group
from elastic_core.io.atomic import write_text
from tasks.runs.provenance import processor_name

NOTES = """\
- Loss and KL(parent ‖ member) in nats per token on the held-out text of section `evaluate`; of exported models that
  transformers has loaded. ± is the 95 % interval of the mean over seeds (Student's t). A seed gives the order of the
  data and the router's noise and initial weights. The parent and its ranking are the same for all seeds.
- Tokens are those of the microbatches that trained the member, in all stages. Minutes are of the whole job's training,
  on one thread, beside whatever else the machine did.
"""


def write(
    directory: Path,
    name: str,
    plan: Plan,
    arms: list[Arm],
    jobs: Mapping[tuple[str, str], list[Job]],
    results: Mapping[str, dict],
) -> str:
    """Write evidence-NAME.md, .json and .svg to a directory. Returns the text of the page."""
    groups = tables.groups_of(arms, jobs, results)
    differences, quality, spreads = tables.differences(groups), tables.equal_quality(groups), tables.spreads(groups)
    svg = plot.draw(groups, differences, tables.equal_quality(groups))
    image = None if svg is None else f"evidence-{name}.svg"
    text = page(name, plan, groups, results, image)
    write_text(directory / f"evidence-{name}.md", text)
    content = {
        "profile": name,
        "steps_scale": plan.steps_scale,
        "arms": [dataclasses.asdict(arm) for arm in arms],
        "groups": [group_json(group) for group in groups],
        "differences": [
            {"arm": group.arm.name, "against": group.arm.against, "member": group.member}
            | {measure: dataclasses.asdict(value) for measure, value in found.items()}
            for group, found in differences
        ],
        "equal_quality": [dataclasses.asdict(row) for row in quality],
        "spreads": [dataclasses.asdict(row) for row in spreads],
    }
    write_text(directory / f"evidence-{name}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    if image is not None:
        write_text(directory / image, svg)
    return text


def group_json(group: Group) -> dict:
    return {"arm": group.arm.name, "member": group.member, "tokens": group.total, "seeds": group.entries}


def page(name: str, plan: Plan, groups: list[Group], results: Mapping[str, dict], image: str | None) -> str:
    """The Markdown text."""
    parents = [result["parent"] for result in results.values() if "parent" in result]
    commits = sorted(
        {str(result["commit"])[:10] + ("" if result["clean"] else "+changes") for result in results.values()}
    )
    scale = "" if plan.steps_scale == 1 else f", {plan.steps_scale:g} of the profile's steps"
    lines = [
        f"# Evidence: profile {name}",
        "",
        f"`python -m benchmarks.evidence --profile {plan.profile}`{scale}. {processor_name()}, commit "
        f"{', '.join(commits)}. Loss of the parent: {parents[0]['loss']:.4f}.",
        *(
            ["", "Results of several versions of the code are compared here; remove older jobs."]
            if len(commits) > 1
            else []
        ),
        *["", NOTES, "## Arms", "", *table(ARMS, map(arm_row, groups))],
        *tasks_lines(groups),
    ]
    if differences := tables.differences(groups):
        number = sum(value.half is not None for _, found in differences for value in found.values())
        note = "Paired by seed; bold where the 95 % interval excludes 0."
        if number:
            note += f" If no arm differed from another, about {number / 20:.1f} of the {number} would do so by chance."
        lines += ["", "## Differences", "", note, ""]
        lines += table(DIFFERENCES, (difference_row(*row) for row in differences))
    if quality := tables.equal_quality(groups):
        lines += ["", "## Tokens for equal quality", "", *table(QUALITY, map(quality_row, quality))]
        lines += [
            "",
            "Tokens of separate training are interpolated (linear in the logarithm of the tokens), not extrapolated.",
        ]
    if spreads := tables.spreads(groups):
        lines += ["", "## Spread over seeds", "", *table(SPREAD, map(spread_row, spreads))]
    if image is not None:
        lines += ["", f"![Differences, and KL over tokens]({image})"]
    return "\n".join(lines) + "\n"


ARMS = ("arm", "member", "seeds", "parameters", "tokens", "zero-shot loss", "loss", "KL to parent", "minutes")
DIFFERENCES = ("arm", "minus", "member", "seeds", "loss", "KL to parent")
QUALITY = (
    "against",
    "equal",
    "family's tokens",
    "reached",
    "tokens of separate training",
    "family ÷ sum of separate",
    "by seed",
)
SPREAD = ("arm", "member", "seeds", "smallest loss", "largest loss", "max − min", "different sizes")


def table(headings: tuple[str, ...], rows: Iterable[Iterable[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [headings, ["---"] * len(headings), *rows]]


def arm_row(group: Group) -> list[str]:
    entries = group.entries.values()
    sizes = sorted(entry["num_parameters"] for entry in entries)
    size = f"{sizes[0]:,}" if sizes[0] == sizes[-1] else f"{sizes[0]:,} to {sizes[-1]:,}"
    tokens = f"{statistics.mean(entry['tokens'] for entry in entries):,.0f}"
    before = set(group.values("loss", "zero_shot").values())
    # With fixed sizes, all seeds have the same slice of the sorted parent: no interval.
    before = before if len(before) == 1 else group.values("loss", "zero_shot").values()
    scores = [estimate(before), *(estimate(group.values(measure).values()) for measure in MEASURES)]
    minutes = statistics.mean(group.seconds.values()) / 60
    texts = map(Estimate.text, scores)
    return [group.arm.name, group.member, str(len(entries)), size, tokens, *texts, f"{minutes:.1f}"]


def difference_row(group: Group, found: dict[str, Estimate]) -> list[str]:
    texts = [
        f"**{value.text(sign=True)}**" if value.excludes_zero else value.text(sign=True) for value in found.values()
    ]
    return [group.arm.name, group.arm.against, group.member, str(next(iter(found.values())).number), *texts]


def quality_row(row: tables.EqualQuality) -> list[str]:
    reached = ", ".join(f"{member} {value:.4f}" for member, value in row.reached.items())
    parts = ", ".join(f"{member} {tokens_text(part)}" for member, part in row.parts.items())
    ratio = "open" if row.ratio is None else f"{row.ratio.bound} {row.ratio.number:.2f}".strip()
    by_seed = "–" if row.by_seed is None else f"{row.by_seed.text(2)} ({row.by_seed.number} seeds)"
    return [", ".join(row.against), MEASURES[row.measure], f"{row.tokens:,.0f}", reached, parts, ratio, by_seed]


def tokens_text(tokens: Tokens) -> str:
    return f"{tokens.bound} {tokens.number:,.0f}".strip()


def spread_row(row: tables.Spread) -> list[str]:
    low, high = row.losses[0], row.losses[-1]
    numbers = [f"{low:.4f}", f"{high:.4f}", f"{high - low:.4f}", str(row.num_sizes)]
    return [row.arm, row.member, str(len(row.losses)), *numbers]


def tasks_lines(groups: list[Group]) -> list[str]:
    """A table of the test tasks, if they were measured."""
    tasks = list(
        dict.fromkeys(task for g in groups for e in g.entries.values() for task in e["trained"].get("tasks", ()))
    )
    if not tasks:
        return []
    rows = []
    for group in groups:
        found = [entry["trained"]["tasks"] for entry in group.entries.values()]
        rows.append(
            [group.arm.name, group.member, *(estimate(s[task]["exact_match"] for s in found).text(3) for task in tasks)]
        )
    return ["", "## Test tasks", "", "Exact match.", "", *table(("arm", "member", *tasks), rows)]
