"""Checks of params.yaml that compare sections with each other. They open no file.

Every check takes the sections and `require`, which is called with keys such as ``train_short.mixture``. A check is left
out if a section that it needs could not be read.
"""

from __future__ import annotations

from collections.abc import Iterable

from elastic_core.config import Require
from elastic_core.cost.budgets import parse
from elastic_core.io.storage import is_url
from elastic_core.training.stage import Stage, uses_itself
from tasks.settings.budgets import check_spellings
from tasks.settings.sections import is_installed

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


def check_seed(params, require: Require) -> None:
    require(params.seed >= 0, "seed", params.seed, "0 or more")


def check_time_limits(params, require: Require) -> None:
    for name, hours in params.time_limits.items():
        require(name in STAGES, "time_limits", name, ", ".join(STAGES))
        require(hours > 0, f"time_limits.{name}", hours, "hours, above 0")


def check_budgets(params, require: Require) -> None:
    check_spellings(params.cost, params.budgets, params.untrained)


def check_train_short(params, require: Require) -> None:
    _check_family_stage(params, "train_short", params.train_short, require)


def check_train_extended(params, require: Require) -> None:
    _check_family_stage(params, "train_extended", params.train_extended, require)


def check_rank(params, require: Require) -> None:
    _check_batch(params, "rank", params.rank, require)


def check_parent_training(params, require: Require) -> None:
    if params.parent.training is not None:
        _check_optimizer(params, "parent.training", params.parent.training, require)
        _check_batch(params, "parent.training", params.parent.training, require)


def check_evaluate(params, require: Require) -> None:
    section = params.evaluate
    if section.held_out is not None:
        allowed = "one source or more; without this parameter, all that are not generated"
        require(len(section.held_out) > 0, "evaluate.held_out", section.held_out, allowed)
        _check_sources(params, "evaluate.held_out", section.held_out, require)
    known = params.prepare_data.task_names()
    for task in section.tasks or ():
        require(task in known, "evaluate.tasks", task, ", ".join(known) or "none, as prepare_data.evaluation is empty")


_OF_A_STAGE = ("prepare_data", "compute", "budgets")
CHECKS = {  # check → the sections that it needs
    check_seed: ("seed",),
    check_budgets: ("cost", "budgets", "untrained"),
    check_rank: ("rank", "prepare_data", "compute"),
    check_parent_training: ("parent", "prepare_data", "compute"),
    check_train_short: ("train_short", *_OF_A_STAGE),
    check_train_extended: ("train_extended", *_OF_A_STAGE),
    check_evaluate: ("evaluate", "prepare_data"),
    check_time_limits: ("time_limits",),
}


def _check_family_stage(params, name: str, stage: Stage, require: Require) -> None:
    _check_shares(params, name, stage, require)
    _check_optimizer(params, name, stage, require)
    if uses_itself(stage):
        _check_teacher(params, name, stage, require)
    if stage.teacher == "cached":
        allowed = "a directory that all workers can reach: teacher cached maps its files into memory"
        require(not is_url(params.compute.storage), "compute.storage", params.compute.storage, allowed)
    _check_batch(params, name, stage, require)


def _check_optimizer(params, name: str, stage: Stage, require: Require) -> None:
    if stage.optimizer == "adamw8bit":
        allowed = "adamw, because the package torchao is not installed (pip install --editable '.[low-bit]')"
        require(is_installed("torchao"), f"{name}.optimizer", stage.optimizer, allowed)
        allowed = "adamw with compute.execution.offload_student, which has the moments in CPU memory"
        require(not params.compute.execution.offload_student, f"{name}.optimizer", stage.optimizer, allowed)


def _check_batch(params, name: str, section, require: Require) -> None:
    """Check the mixture, and that every worker gets as many sequences as the others."""
    _check_sources(params, f"{name}.mixture", section.mixture, require)
    size, workers = section.batch_size // max(1, getattr(section, "microbatches", 1)), max(1, params.compute.workers)
    sharing = params.compute.execution.context_parallel if isinstance(section, Stage) else 1
    if sharing < 1 or workers % sharing:  # a problem of its own
        return
    text = f"compute.workers ({workers})" + (f" / context_parallel ({sharing})" if sharing > 1 else "")
    allowed = f"sequences that divide evenly by {text} in every microbatch"
    require(size % (workers // sharing) == 0, f"{name}.batch_size", section.batch_size, allowed)
    allowed = f"a multiple of compute.execution.context_parallel ({sharing}), whose workers have equal parts of it"
    require(section.sequence_length % sharing == 0, f"{name}.sequence_length", section.sequence_length, allowed)


def _check_sources(params, key: str, names: Iterable[str], require: Require) -> None:
    known = params.prepare_data.sources
    for name in names:
        require(name in known, key, name, f"{', '.join(known)} (prepare_data.sources)")


def _check_shares(params, name: str, stage: Stage, require: Require) -> None:
    if not params.budgets:  # a problem of its own
        return
    for field_name in ("budget_shares", "loss_by_budget"):
        for key in getattr(stage, field_name):
            require(key in params.budgets, f"{name}.{field_name}", key, ", ".join(params.budgets))
    if stage.budget_shares:  # a budget without a share would never be trained
        missing = [budget for budget in params.budgets if budget not in stage.budget_shares]
        allowed = f"a share for every budget, also for {', '.join(missing)}"
        require(not missing, f"{name}.budget_shares", stage.budget_shares, allowed)


def _check_teacher(params, name: str, stage: Stage, require: Require) -> None:
    """A trainable teacher is the family's full budget. It has no teacher, so it has to learn from text."""
    full = next((budget for budget, given in params.budgets.items() if parse(given).is_full), None)
    if not require(full is not None, f"{name}.teacher", stage.teacher, "frozen, because no budget is 1.0"):
        return
    allowed = f"above 0: a {stage.teacher} teacher must itself learn from text"
    weight, share = stage.loss_of(full).ce_weight, stage.budget_shares.get(full, 1.0)
    require(weight > 0, f"{name}.loss_by_budget.{full}.ce_weight", weight, allowed)
    require(share > 0, f"{name}.budget_shares.{full}", share, allowed)
