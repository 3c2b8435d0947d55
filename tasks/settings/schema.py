"""The whole of params.yaml as one frozen dataclass. Needs no torch, and opens no file.

The dataclasses of the sections are in sections.py and in elastic_core.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from elastic_core.config import require
from elastic_core.cost.budgets import Cost, Spelling, parse
from elastic_core.search.choices import Choices
from elastic_core.training.stage import Routing, Stage
from tasks.settings.budgets import check_spellings
from tasks.settings.sections import Compute, Evaluate, Extract, Parent, PrepareData, Rank, Tracking

STAGES = (
    "fingerprint",
    "prepare_data",
    "parent",
    "rank",
    "train_short",
    "train_extended",
    "extract",
    "extract_untrained",
    "evaluate_parent",
    "evaluate",
    "evaluate_untrained",
    "report",
)


@dataclass(frozen=True)
class Params:
    """The whole of params.yaml. `check` compares the sections with each other."""

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

    def check(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        for name, hours in self.time_limits.items():
            require(name in STAGES, "time_limits", name, ", ".join(STAGES))
            require(hours > 0, f"time_limits.{name}", hours, "hours, above 0")
        check_spellings(self.cost, self.budgets, self.untrained)
        stages = {"train_short": self.train_short, "train_extended": self.train_extended}
        for name, stage in stages.items():
            self._check_shares(name, stage)
            if stage.teacher != "frozen":
                self._check_teacher(name, stage)
        if self.parent.training is not None:
            stages["parent.training"] = self.parent.training
        for name, section in {**stages, "rank": self.rank}.items():
            size, workers = section.batch_size // getattr(section, "microbatches", 1), max(1, self.compute.workers)
            allowed = f"sequences that divide evenly by compute.workers ({workers}) in every microbatch"
            require(size % workers == 0, f"{name}.batch_size", section.batch_size, allowed)
            self._check_sources(f"{name}.mixture", section.mixture)
        self._check_sources("evaluate.held_out", self.evaluate.held_out)
        known = self.prepare_data.task_names()
        for task in self.evaluate.tasks:
            require(task in known, "evaluate.tasks", task, ", ".join(known))

    def _check_sources(self, key: str, names: Iterable[str]) -> None:
        for name in names:
            require(name in self.prepare_data.sources, key, name, ", ".join(self.prepare_data.sources))

    def _check_shares(self, name: str, stage: Stage) -> None:
        for field_name in ("budget_shares", "loss_by_budget"):
            for key in getattr(stage, field_name):
                require(key in self.budgets, f"{name}.{field_name}", key, ", ".join(self.budgets))
        if stage.budget_shares:  # a budget without a share would never be trained
            missing = [budget for budget in self.budgets if budget not in stage.budget_shares]
            allowed = f"a share for every budget, also for {', '.join(missing)}"
            require(not missing, f"{name}.budget_shares", stage.budget_shares, allowed)

    def _check_teacher(self, name: str, stage: Stage) -> None:
        """A trainable teacher is the family's full budget. It has no teacher, so it has to learn from text."""
        full = [budget for budget, given in self.budgets.items() if parse(given).is_full]
        require(bool(full), f"{name}.teacher", stage.teacher, "frozen, because no budget is 1.0")
        allowed = f"above 0: a {stage.teacher} teacher must itself learn from text"
        weight, share = stage.loss_of(full[0]).ce_weight, stage.budget_shares.get(full[0], 1.0)
        require(weight > 0, f"{name}.loss_by_budget.{full[0]}.ce_weight", weight, allowed)
        require(share > 0, f"{name}.budget_shares.{full[0]}", share, allowed)
