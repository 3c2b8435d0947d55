"""The comparison of arms: what is in the results of the jobs, member by member, as rows of tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from benchmarks.evidence.arms import BASE, FIXED, Arm
from benchmarks.evidence.intervals import Estimate, Tokens, estimate, paired, ratio_to_sum, tokens_to_reach
from benchmarks.evidence.jobs import Job

MEASURES = {"loss": "loss", "kl_to_parent": "KL"}  # name in the results → heading


@dataclass(frozen=True)
class Group:
    """One member of one arm, by seed: its entry in the results, the tokens of the whole job, seconds of training."""

    arm: Arm
    member: str
    entries: dict[int, dict]
    total: dict[int, int]
    seconds: dict[int, float]

    def values(self, measure: str, version: str = "trained") -> dict[int, float]:
        """Seed → a held-out score."""
        return {seed: entry[version][measure] for seed, entry in self.entries.items()}

    def mean(self, measure: str) -> float:
        return statistics.mean(self.values(measure).values())


def groups_of(
    arms: Iterable[Arm], jobs: Mapping[tuple[str, str], list[Job]], results: Mapping[str, dict]
) -> list[Group]:
    """The results by arm and member, in the order of the arms, of the jobs that are done."""
    found: dict[tuple[str, str], Group] = {}
    by_name = {arm.name: arm for arm in arms}
    for (name, _), group in jobs.items():
        for job in (job for job in group if job.digest in results):
            result = results[job.digest]
            for member, entry in result["members"].items():
                kept = found.setdefault((name, member), Group(by_name[name], member, {}, {}, {}))
                kept.entries[job.seed], kept.total[job.seed] = entry, result["tokens"]
                kept.seconds[job.seed] = result["training_seconds"]
    return list(found.values())


def differences(groups: Iterable[Group]) -> list[tuple[Group, dict[str, Estimate]]]:
    """Of every group whose arm has another to compare with: measure → paired difference. Families against families."""
    known = {(group.arm.name, group.member): group for group in groups}
    rows = []
    for (name, member), group in known.items():
        other = known.get((group.arm.against, member))
        if other is None or name == group.arm.against:
            continue
        found = {measure: paired(group.values(measure), other.values(measure)) for measure in MEASURES}
        if None not in found.values():
            rows.append((group, found))
    return rows


@dataclass(frozen=True)
class EqualQuality:
    """What separate training needs to reach what a family reached, by one measure.

    - `against`: the arms of separate training, which differ in their tokens only.
    - `tokens`: the family's. `parts`: member → tokens of separate training, by the means over seeds.
    - `ratio`: `tokens` divided by the sum of `parts`. `by_seed`: the same for every seed alone, if none is a bound.
    """

    arm: str
    against: list[str]
    measure: str
    tokens: float
    reached: dict[str, float]
    parts: dict[str, Tokens]
    ratio: Tokens | None
    by_seed: Estimate | None


def equal_quality(groups: Iterable[Group], family: str = BASE) -> list[EqualQuality]:
    """The comparison of a family with separate training of its members, for every measure. [] without both.

    Separate training with other parameters is a comparison of its own.
    """
    groups, kinds = list(groups), {}
    for group in groups:
        if group.arm.separate:
            kind = kinds.setdefault(json.dumps(group.arm.overrides, sort_keys=True), {})
            kind.setdefault(group.member, []).append(group)
    return [row for separate in kinds.values() for row in _compared(groups, family, separate)]


def _compared(groups: list[Group], family: str, separate: dict[str, list[Group]]) -> list[EqualQuality]:
    """`equal_quality` with one kind of separate training: member → its arms."""
    own = {group.member: group for group in groups if group.arm.name == family and group.member in separate}
    if not own or own.keys() != separate.keys():
        return []
    tokens = statistics.mean(next(iter(own.values())).total.values())
    found, arms = [], list(dict.fromkeys(group.arm.name for curve in separate.values() for group in curve))
    for measure in MEASURES:
        reached = {member: group.mean(measure) for member, group in own.items()}
        parts = {
            member: tokens_to_reach(
                [(statistics.mean(g.total.values()), g.mean(measure)) for g in curve], reached[member]
            )
            for member, curve in separate.items()
        }
        ratio = ratio_to_sum(tokens, list(parts.values()))
        found.append(
            EqualQuality(family, arms, measure, tokens, reached, parts, ratio, _by_seed(own, separate, measure))
        )
    return found


def _by_seed(own: Mapping[str, Group], separate: Mapping[str, list[Group]], measure: str) -> Estimate | None:
    """The ratio for every seed that all groups have. None if one of them is only a bound."""
    seeds = set.intersection(*(set(g.entries) for curve in [own.values(), *separate.values()] for g in curve))
    ratios = []
    for seed in sorted(seeds):
        parts = [
            tokens_to_reach(
                [(g.total[seed], g.values(measure)[seed]) for g in curve], own[member].values(measure)[seed]
            )
            for member, curve in separate.items()
        ]
        ratio = ratio_to_sum(next(iter(own.values())).total[seed], parts)
        if ratio is None or ratio.bound:
            return None
        ratios.append(ratio.number)
    return estimate(ratios) if ratios else None


@dataclass(frozen=True)
class Spread:
    """How much the loss of an arm's smallest member differs between seeds, and how many sizes the router chose."""

    arm: str
    member: str
    losses: list[float]
    num_sizes: int


def spreads(groups: Iterable[Group]) -> list[Spread]:
    """The smallest member of every arm whose sizes differ by seed."""
    smallest: dict[str, Group] = {}
    for group in groups:
        if group.arm.members != FIXED:
            best = smallest.get(group.arm.name)
            if best is None or target_of(group) < target_of(best):
                smallest[group.arm.name] = group
    found = []
    for name, group in smallest.items():
        sizes = {str(entry["submodel"]) for entry in group.entries.values()}
        found.append(Spread(name, group.member, sorted(group.values("loss").values()), len(sizes)))
    return found


def target_of(group: Group) -> float:
    return next(iter(group.entries.values()))["target"]
