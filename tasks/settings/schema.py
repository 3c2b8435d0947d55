"""The whole of params.yaml as one frozen dataclass. Needs no torch, and opens no file.

The dataclasses of the sections are in sections.py and in elastic_core. Checks that compare sections are in
cross_checks.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from elastic_core.cost.budgets import Cost, Spelling
from elastic_core.search.choices import Choices
from elastic_core.training.stage import Routing, Stage
from tasks.settings.parts.parent import Parent
from tasks.settings.paths import locate, locate_parent
from tasks.settings.sections import Compute, Evaluate, Extract, PrepareData, Rank, Tracking

SECTIONS = (  # the order of params.yaml, in which problems are listed
    *("seed", "budgets", "cost", "untrained", "choices", "prepare_data", "parent", "rank", "routing"),
    *("train_short", "train_extended", "extract", "evaluate", "compute", "time_limits", "tracking"),
)


@dataclass(frozen=True)
class Params:
    """The whole of params.yaml."""

    budgets: dict[str, Spelling]  # trained; tasks.parents.targets turns them into shares of the parent
    prepare_data: PrepareData
    parent: Parent
    rank: Rank
    train_short: Stage
    train_extended: Stage
    evaluate: Evaluate
    untrained: dict[str, Spelling] = field(default_factory=dict)  # sliced from the same weights without training
    cost: Cost = field(default_factory=Cost)
    choices: Choices = field(default_factory=Choices)
    routing: Routing = field(default_factory=Routing)
    extract: Extract = field(default_factory=Extract)
    compute: Compute = field(default_factory=Compute)
    tracking: Tracking = field(default_factory=Tracking)
    time_limits: dict[str, float] = field(default_factory=dict)  # stage → hours
    seed: int = 0

    @property
    def served(self) -> dict[str, Spelling]:
        """All budgets that are extracted and evaluated: the trained and the untrained ones."""
        return {**self.budgets, **self.untrained}

    def completed(self) -> Params:
        """The same with the values that may be left out: mixtures, held-out sources, test tasks, located paths."""
        equal = dict.fromkeys(self.prepare_data.sources, 1.0)
        names = ("rank", "train_short", "train_extended")
        changes = {name: _with_mixture(getattr(self, name), equal) for name in names}
        parent, evaluate = self.parent, self.evaluate
        if parent.training is not None:
            parent = replace(parent, training=_with_mixture(parent.training, equal))
        if evaluate.held_out is None:
            evaluate = replace(evaluate, held_out=tuple(self.prepare_data.not_generated_names()))
        if evaluate.tasks is None:
            evaluate = replace(evaluate, tasks=tuple(self.prepare_data.practised_task_names()))
        if evaluate.lengths is None:
            stages = (self.train_short, self.train_extended)
            evaluate = replace(evaluate, lengths=tuple(sorted({stage.sequence_length for stage in stages})))
        changes |= located({"parent": parent, "evaluate": evaluate, "cost": self.cost})
        return replace(self, **changes)


def located(sections: dict) -> dict:
    """The same sections (name → dataclass) with the paths of parent, benchmarks and table where they are found."""
    found = dict(sections)
    if "parent" in found and found["parent"].path is not None:
        found["parent"] = replace(found["parent"], path=locate_parent(found["parent"].path))
    if "evaluate" in found and found["evaluate"].benchmarks is not None:
        found["evaluate"] = replace(found["evaluate"], benchmarks=found["evaluate"].benchmarks.located())
    if "cost" in found and found["cost"].table is not None:
        found["cost"] = replace(found["cost"], table=locate(found["cost"].table))
    return found


def _with_mixture(section: Rank | Stage, mixture: dict[str, float]) -> Rank | Stage:
    return section if section.mixture else replace(section, mixture=mixture)
