"""A training run: what it trains, what it learns from, how far it has come; checked before any work, and resumable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from elastic_core.config import ConfigError
from elastic_core.cost.metrics import PARAMETERS, Metric, exact_cost
from elastic_core.data.loader import PackedSequences
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.model.slicing import Slice
from elastic_core.model.submodel import Submodel
from elastic_core.search.router import Router
from elastic_core.search.selection import Member
from elastic_core.training.checkpoint import Checkpoints
from elastic_core.training.distributed.gradients import local
from elastic_core.training.distributed.placement import is_matrix
from elastic_core.training.distributed.ranks import Ranks
from elastic_core.training.stage import Routing, Stage


@dataclass
class Run:
    """One stage's training run.

    `budgets` maps names to targets (fractions of the parent's cost), largest first. With a `router` the submodels are
    still open; `members` names them once they are chosen, or from the start where they are given. Costs are in the
    router's metric, or, where there is none, in `metric`. Model and teacher are placed (see `distributed.place`) on
    `ranks.device`; the router stays in CPU memory, alike on every rank.
    """

    model: ElasticModel
    stage: Stage
    data: PackedSequences
    budgets: dict[str, float]
    members: dict[str, Member] | None = None
    router: Router | None = None
    routing: Routing = field(default_factory=Routing)
    teacher: ElasticModel | None = None
    metric: Metric = PARAMETERS
    seed: int = 0
    checkpoints: str | os.PathLike | None = None
    ranks: Ranks = field(default_factory=Ranks)
    step: int = 0
    skipped: int = 0  # steps that changed nothing, because a loss or gradient was not finite
    skipped_in_a_row: int = 0
    settled_for: int = 0
    last_choices: list[list[int]] | None = None
    indices: list[list[int]] | None = None

    def __post_init__(self):
        if (self.members is None) == (self.router is None):
            raise ConfigError("Run: give either the members of the family or a router that chooses them")
        assert self.router is None or self.router.targets == tuple(self.budgets.values())
        self.ranks.part(self.stage.batch_size // self.stage.microbatches, "batch_size / microbatches")
        check_budgets(self)
        check_teacher(self)
        if self.router is not None:
            self.metric = self.router.space.metric
        self.parent_cost = exact_cost(self.metric, self.model.config)
        self.optimizer = make_optimizer(self.model, self.router, self.stage, self.routing)
        self.frozen_teacher = None if self.teacher is None else self.teacher.requires_grad_(False).eval()
        self._costs: dict[str, float] = {}
        self._slices: dict[tuple[int, Submodel], Slice] = {}

    def slice_of(self, model: ElasticModel, submodel: Submodel | None = None) -> Slice:
        """`model.cut(submodel)`, looked up once in a run and not in every microbatch."""
        key = id(model), submodel or model.full
        if key not in self._slices:
            self._slices[key] = model.slice(submodel)
        return self._slices[key]

    def member_cost(self, budget: str) -> float:
        """Cost of a budget's submodel, once it is chosen."""
        if budget not in self._costs:
            self._costs[budget] = exact_cost(self.metric, self.model.config, self.members[budget].submodel)
        return self._costs[budget]


def check_budgets(run: Run) -> None:
    """Raise ConfigError for a budget that the stage names and the family does not have."""
    for name in ("budget_shares", "loss_by_budget"):
        if unknown := sorted(set(getattr(run.stage, name)) - set(run.budgets)):
            raise ConfigError(f"{name}: got {', '.join(unknown)}; allowed: the budgets {', '.join(run.budgets)}")


def check_teacher(run: Run) -> None:
    """Raise ConfigError, before any work, where a budget would have no teacher, or a teacher nothing to learn from."""
    stage, shares = run.stage, run.stage.budget_shares or dict.fromkeys(run.budgets, 1.0)
    if run.teacher is run.model:
        raise ConfigError("teacher: got the model itself, which would be frozen; load it twice, or use trainable")
    if run.teacher is not None and run.teacher.config.vocab_size != run.model.config.vocab_size:
        raise ConfigError(
            f"teacher: has a vocabulary of {run.teacher.config.vocab_size}, the model one of "
            f"{run.model.config.vocab_size}; distillation needs a teacher with the model's own tokenizer"
        )
    for name in run.budgets:
        weights, share = stage.loss_of(name), shares.get(name, 0.0)
        if stage.teacher != "trainable" and run.teacher is None and share > 0 and weights.kl_weight > 0:
            raise ConfigError(
                f"loss.kl_weight: got {weights.kl_weight} for budget {name}, but the {stage.teacher} teacher's model "
                "is not there; give one, or set kl_weight to 0 (and ce_weight above 0)"
            )
        if stage.teacher != "frozen" and run.budgets[name] == 1.0 and not (weights.ce_weight > 0 and share > 0):
            raise ConfigError(
                f"teacher: got {stage.teacher}, but its own budget {name} has ce_weight {weights.ce_weight} and a "
                f"share of {share}; set both above 0 (loss_by_budget, budget_shares): it must itself learn from text"
            )
    if stage.teacher != "frozen" and 1.0 not in run.budgets.values():
        raise ConfigError(f"teacher: got {stage.teacher}, which is the full budget; give budgets a 1.0, or use frozen")


def make_optimizer(model: ElasticModel, router: Router | None, stage: Stage, routing: Routing) -> torch.optim.AdamW:
    """AdamW with groups for decayed weights, everything else of the model, and the router.

    Gradients of what a step does not touch are None, not zero, so a layer that no microbatch of a step ran is moved
    neither by weight decay nor by stale momentum. The first group is what is sharded, the others are whole.
    """
    decayed = [p for p in model.parameters() if is_matrix(p)]
    plain = [p for p in model.parameters() if not is_matrix(p)]
    groups = [
        {"params": decayed, "weight_decay": stage.weight_decay, "peak": stage.learning_rate},
        {"params": plain, "weight_decay": 0.0, "peak": stage.learning_rate},
    ]
    if router is not None:
        groups.append({"params": list(router.parameters()), "weight_decay": 0.0, "peak": routing.learning_rate})
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=stage.betas, fused=True)


def trained_modules(run: Run) -> tuple[nn.Module, ...]:
    """What the optimizer moves: the model, and the router where there is one."""
    return (run.model,) if run.router is None else (run.model, run.router)


def named_parameters(run: Run) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter that the optimizer moves, by a name that is the same whatever it is sharded over."""
    for prefix, module in zip(("model", "router"), trained_modules(run), strict=False):
        for name, parameter in module.named_parameters():
            yield f"{prefix}.{name}", parameter


def state_tensors(run: Run) -> dict[str, Tensor]:
    """All tensors of a checkpoint, the run's own: weights and the optimizer's moments.

    AdamW makes a parameter's moments when it first has a gradient; zeros from the start are the same.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in named_parameters(run):
        state = run.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=local(parameter).device)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in range(2))
        tensors[name] = parameter.detach()
        tensors |= {f"optimizer.{key}.{name}": value for key, value in state.items()}
    return tensors


def save(run: Run, checkpoints: Checkpoints) -> None:
    """Begin to write everything that a resumed run needs; the data position is the step, noise is a function of it."""
    progress = {name: getattr(run, name) for name in PROGRESS}
    checkpoints.save(run.step, state_tensors(run), progress)


def resume(run: Run, checkpoints: Checkpoints) -> None:
    """Continue from the newest intact checkpoint, if there is one."""
    progress = checkpoints.load_newest(state_tensors(run))
    if progress is None:
        return
    for name in PROGRESS:
        setattr(run, name, progress[name])
    if run.indices is not None:
        run.members = members_of(run)


PROGRESS = ("step", "skipped", "skipped_in_a_row", "settled_for", "last_choices", "indices")


def members_of(run: Run) -> dict[str, Member]:
    """The chosen family by name."""
    submodels = [run.router.space.submodel(indices) for indices in run.indices]
    return {name: Member(run.budgets[name], s) for name, s in zip(run.budgets, submodels, strict=True)}
