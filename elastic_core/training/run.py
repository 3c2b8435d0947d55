"""The state of a training run: model, router, optimizer, data and progress. It is checked before any work starts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from elastic_core.config import ConfigError
from elastic_core.cost.metrics import PARAMETERS, Metric, exact_cost
from elastic_core.data.loader import Batch, PackedSequences
from elastic_core.model import architectures
from elastic_core.model.documents import Documents, documents_of
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.model.ops.parts import PartDocuments
from elastic_core.model.slicing import Slice
from elastic_core.model.submodel import Submodel
from elastic_core.search.router import Router
from elastic_core.search.selection import Member
from elastic_core.training.budget_norms import make_budget_norms
from elastic_core.training.checkpoint import Checkpoints
from elastic_core.training.distributed.context import make_part
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.distributed.placement import autocast
from elastic_core.training.distributed.ranks import Ranks
from elastic_core.training.losses import KeptLogits
from elastic_core.training.optimizer import make_optimizer
from elastic_core.training.stage import Routing, Stage, uses_itself, uses_trainable_teacher
from elastic_core.training.teacher_cache import TeacherCache


@dataclass
class Run:
    """The training run of one stage.

    - `budgets` maps names to targets (fractions of the parent's cost), largest first.
    - `members` maps budgets to their submodels. Give either the members or a `router`. With a router, `members` is None
      until the router's choice has settled.
    - `model` and `teacher` are placed on `ranks.device` (see `distributed.placement.place`). The router stays in CPU
      memory and is the same on every rank.
    - `teacher_cache`: for teacher ``cached``, with all of its files.
    - Costs are in the router's metric. Without a router, they are in `metric`.
    - `checkpoints`: directory or URL of the checkpoints (None: write none).
    - `settled_for`: for how many steps the router's choice has been the same. `last_choices`: that choice, one
      combination per budget. `indices`: the final combinations; None until the choice has settled. `comparison`: how
      they were chosen, as JSON values (see candidates.py); None if no candidates were compared.
    - `norms`: the norm gains of budgets; None if the model has none for submodels.
    - `execution`: how the workers hold and run the model, as in `place`.
    - `progress(what, done, total)` is called during the comparison of candidates.

    Raises ConfigError if budgets, teacher, stage and number of ranks do not fit together.
    """

    model: ElasticModel
    stage: Stage
    data: PackedSequences
    budgets: dict[str, float]
    members: dict[str, Member] | None = None
    router: Router | None = None
    routing: Routing = field(default_factory=Routing)
    teacher: ElasticModel | None = None
    teacher_cache: TeacherCache | None = None
    metric: Metric = PARAMETERS
    seed: int = 0
    checkpoints: str | os.PathLike | None = None
    ranks: Ranks = field(default_factory=Ranks)
    execution: Execution = field(default_factory=Execution)
    step: int = 0
    skipped: int = 0  # steps without an update, because a loss or gradient was not finite
    skipped_in_a_row: int = 0
    settled_for: int = 0
    last_choices: list[list[int]] | None = None
    indices: list[list[int]] | None = None
    comparison: dict | None = None
    progress: Callable[[str, int, int], None] | None = None

    def __post_init__(self):
        if (self.members is None) == (self.router is None):
            raise ConfigError("Run: give either the members of the family or a router that chooses them")
        assert self.router is None or self.router.targets == tuple(self.budgets.values())
        self.part = make_part(self.ranks, self.execution.context_parallel)
        check_part(self)
        check_budget_names(self)
        check_teacher(self)
        check_teacher_states(self)
        if self.router is not None:
            self.metric = self.router.space.metric
        self.parent_cost = exact_cost(self.metric, self.model.config)
        self.norms = make_budget_norms(self.model, self.budgets, self.ranks.device)
        self.optimizer = make_optimizer(self.model, self.router, self.norms, self.stage, self.routing)
        self.frozen_teacher = None if self.teacher is None else self.teacher.requires_grad_(False).eval()
        if self.members is not None:
            take_norms(self, start=True)
        self._costs: dict[str, float] = {}
        self._slices: dict[tuple[int, Submodel], Slice] = {}

    def own_sequences(self, count: int) -> slice:
        """Which of `count` sequences this rank computes, alone or together with those that share sequences with it."""
        return self.ranks.part(count, "batch_size / microbatches", self.execution.context_parallel)

    def batch(self, first: int, count: int) -> Batch:
        """This rank's part of the samples `first` to `first + count - 1`, in CPU memory.

        Where ranks share sequences, ids and labels are this rank's positions, and the document ids are whole rows.
        """
        own = self.own_sequences(count)
        batch = self.data.batch(first + own.start, own.stop - own.start)
        if self.part is None:
            return batch
        where = self.part.positions(batch.input_ids.shape[1])
        return Batch(batch.input_ids[:, where], batch.labels[:, where], batch.document_ids)

    def documents(self, batch: Batch, input_ids: Tensor) -> Documents | None:
        """The documents of a batch of `batch`, on the device of its `input_ids`."""
        if self.part is None:
            return documents_of(batch.document_ids, input_ids)
        return PartDocuments(batch.document_ids, input_ids.device, self.part)

    def cached_logits(self, microbatch: int) -> KeptLogits | None:
        """What the teacher says about this rank's part of a microbatch, from disk. None without a cache."""
        if self.teacher_cache is None:
            return None
        own = self.own_sequences(self.stage.batch_size // self.stage.microbatches)
        first = self.stage.first_sample(self.step, microbatch) + own.start
        kept = self.teacher_cache.logits(first, own.stop - own.start, self.ranks.device)
        if self.part is None:
            return kept
        where = self.part.positions(self.stage.sequence_length)
        return KeptLogits(*(tensor[:, where] for tensor in kept))

    def slice_of(self, model: ElasticModel, submodel: Submodel | None = None) -> Slice:
        """`model.slice(submodel)`, made once per run and not in every microbatch, with the norm gains of now."""
        submodel = (submodel or model.full).resolve(model.config)
        return self._slice_without_gains(model, submodel).with_norm_gains(model.gains_of(submodel))

    def _slice_without_gains(self, model: ElasticModel, submodel: Submodel) -> Slice:
        key = id(model), submodel
        if key not in self._slices:
            self._slices[key] = model.slice(submodel).with_norm_gains({})
        return self._slices[key]

    def slice_of_budget(self, budget: str) -> Slice:
        """The slice of a budget's submodel, with the norm gains that the budget trains. Needs `members`.

        Budgets with the same submodel train the same gains, those of the first of them: it is extracted with these.
        """
        submodel = self.members[budget].submodel.resolve(self.model.config)
        sliced = self._slice_without_gains(self.model, submodel)
        if self.norms is None or submodel == self.model.full:
            return sliced
        same = (b for b in self.norms.budgets if self.members[b].submodel.resolve(self.model.config) == submodel)
        return sliced.with_norm_gains(self.norms.of(next(same)))

    def forget_slices(self) -> None:
        """Free the memory of all slices. They are made again when they are needed."""
        self._slices.clear()

    @property
    def shares(self) -> dict[str, float]:
        """The budgets' shares of the microbatches. They need not sum to 1."""
        return self.stage.budget_shares or dict.fromkeys(self.budgets, 1.0)

    def member_cost(self, budget: str) -> float:
        """The cost of a budget's submodel. Call it only when `members` is set."""
        if budget not in self._costs:
            self._costs[budget] = exact_cost(self.metric, self.model.config, self.members[budget].submodel)
        return self._costs[budget]


def check_part(run: Run) -> None:
    """Raise ConfigError if the ranks cannot have equal parts of the batches."""
    stage, size = run.stage, run.execution.context_parallel
    run.own_sequences(stage.batch_size // stage.microbatches)
    smallest = size * architectures.smallest_part(run.model.config)
    if size > 1 and (stage.sequence_length % size or stage.sequence_length < smallest):
        allowed = f"multiples of context_parallel ({size}), {smallest} or more"
        raise ConfigError(f"sequence_length: got {stage.sequence_length}; allowed: {allowed}")


def check_budget_names(run: Run) -> None:
    """Raise ConfigError if the stage has settings for a budget that is not in `run.budgets`."""
    for name in ("budget_shares", "loss_by_budget"):
        if unknown := sorted(set(getattr(run.stage, name)) - set(run.budgets)):
            raise ConfigError(f"{name}: got {', '.join(unknown)}; allowed: the budgets {', '.join(run.budgets)}")


def check_teacher(run: Run) -> None:
    """Raise ConfigError if a budget has no teacher to learn from, or if a trainable teacher would not learn itself.

    A trainable teacher is the full budget. It must learn from text by cross-entropy. Otherwise text has no influence:
    any output that teacher and students share would have a loss of zero.
    """
    stage, shares = run.stage, run.shares
    if run.teacher is run.model:
        raise ConfigError("teacher: got the model itself, which would be frozen; load it twice, or use 'trainable'")
    if run.teacher is not None and run.teacher.config.vocab_size != run.model.config.vocab_size:
        raise ConfigError(
            f"teacher: got a vocabulary of {run.teacher.config.vocab_size}; allowed: {run.model.config.vocab_size}, as "
            "in the model, because distillation needs a teacher with the same tokenizer"
        )
    for name in run.budgets:
        weights, share = stage.loss_of(name), shares.get(name, 0.0)
        for field_name in ("kl_weight", "state_weight"):
            weight = getattr(weights, field_name)
            has_frozen = run.teacher is not None or run.teacher_cache is not None
            if stage.teacher != "trainable" and not has_frozen and share > 0 and weight > 0:
                raise ConfigError(
                    f"loss.{field_name}: got {weight} for budget {name}, but no model for the {stage.teacher} "
                    f"teacher; give one, or set {field_name} to 0 (and ce_weight above 0)"
                )
        if uses_itself(stage) and run.budgets[name] == 1.0 and not (weights.ce_weight > 0 and share > 0):
            raise ConfigError(
                f"teacher: got {stage.teacher}, so budget {name} is the teacher, but it has ce_weight "
                f"{weights.ce_weight} and a share of {share}; set both above 0 (loss_by_budget, budget_shares), so "
                "that it learns from text"
            )
    if uses_itself(stage) and 1.0 not in run.budgets.values():
        raise ConfigError(f"teacher: got {stage.teacher}, which needs a budget of 1.0; add one, or use 'frozen'")


def check_teacher_states(run: Run) -> None:
    """Raise ConfigError if states are to be matched with a frozen teacher of other shapes.

    Channel i of such a teacher is not channel i of the model.
    """
    stage, shares = run.stage, run.stage.budget_shares or dict.fromkeys(run.budgets, 1.0)
    weight = max(stage.loss_of(name).state_weight for name in run.budgets if shares.get(name, 0.0) > 0)
    if weight == 0 or run.teacher is None or stage.teacher == "trainable":
        return
    theirs, ours = (architectures.shapes(model.config) for model in (run.teacher, run.model))
    if theirs != ours:
        name = next(name for name in [*ours, *theirs] if ours.get(name) != theirs.get(name))
        raise ConfigError(
            f"loss.state_weight: got {weight}, but the teacher has other shapes than the model: {name} is "
            f"{theirs.get(name, 'missing')} and not {ours.get(name, 'missing')}; use the parent of the model as the "
            "teacher, or set state_weight to 0"
        )


def teacher_of(run: Run, microbatch: int, budget: str) -> ElasticModel | None:
    """The teacher of a microbatch, or None if it has no teacher or needs none.

    The teacher is the frozen parent or the full budget of the model itself. In the second case the full budget has no
    teacher: it learns from text only.
    """
    if run.stage.loss_of(budget).kl_weight == 0 and not matches_states(run, budget):
        return None
    if not uses_trainable_teacher(run.stage, run.shares, run.seed, run.step, microbatch):
        return run.frozen_teacher
    return None if run.budgets[budget] == 1.0 else run.model


def matches_states(run: Run, budget: str) -> bool:
    """Whether a budget's states are matched with those of its teacher: not before its submodel is settled."""
    return run.members is not None and run.stage.loss_of(budget).state_weight > 0


def trained_modules(run: Run) -> dict[str, nn.Module]:
    """What the optimizer updates, by name: the model, the norm gains of budgets and the router, if there are any."""
    modules = {"model": run.model, "norms": run.norms, "router": run.router}
    return {name: module for name, module in modules.items() if module is not None}


def named_parameters(run: Run) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter that the optimizer updates, with a name that does not depend on the sharding."""
    for prefix, module in trained_modules(run).items():
        for name, parameter in module.named_parameters():
            yield f"{prefix}.{name}", parameter


def state_tensors(run: Run) -> dict[str, Tensor]:
    """All tensors of a checkpoint: weights and AdamW's moments. They are the run's own tensors, not copies."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in named_parameters(run):
        tensors[name] = parameter.detach()
        moments = run.optimizer.moments(parameter)
        tensors |= {f"optimizer.{key}.{name}": value for key, value in moments.items()}
    return tensors


def save(run: Run, checkpoints: Checkpoints) -> None:
    """Start to write a checkpoint of everything that a resumed run needs, in the background.

    The position in the data and the router's noise are not stored, because they follow from the step.
    """
    progress = {name: getattr(run, name) for name in PROGRESS}
    checkpoints.save(run.step, state_tensors(run), progress)


def resume(run: Run, checkpoints: Checkpoints) -> None:
    """Set the run to the newest intact checkpoint, if there is one. Raises CheckpointError if it cannot be read."""
    progress = checkpoints.load_newest(state_tensors(run))
    if progress is None:
        return
    for name in PROGRESS:
        setattr(run, name, progress[name])
    if run.indices is not None:
        run.members = members_of(run)
        take_norms(run, start=False)


# The fields of a run that a checkpoint stores besides tensors.
PROGRESS = ("step", "skipped", "skipped_in_a_row", "settled_for", "last_choices", "indices", "comparison")


def take_norms(run: Run, start: bool) -> None:
    """From now on, submodels of the model have the norm gains that budgets train. Call it when `members` are known.

    With `start`, each budget starts from the gains that its submodel has had so far. Raises UserError if the members
    are not nested.
    """
    if run.norms is None:
        return
    submodels = {name: member.submodel.resolve(run.model.config) for name, member in run.members.items()}
    whole = {name: run.model.get_parameter(name) for name in run.norms.names}
    for name in run.norms.budgets if start else ():
        run.norms.start(name, run.model.gains_of(submodels[name]) or whole)
    run.model.norm_gains = run.norms.gains_in_use(run.model.config, submodels)


def members_of(run: Run) -> dict[str, Member]:
    """The final member of every budget, from the combinations in `run.indices`."""
    submodels = [run.router.space.submodel(indices) for indices in run.indices]
    return {name: Member(run.budgets[name], s) for name, s in zip(run.budgets, submodels, strict=True)}


def precision(stage: Stage, device: torch.device) -> contextlib.AbstractContextManager:
    """The autocast context of the stage. Master weights, norms and the state space scan stay in float32."""
    return autocast(stage.precision, device)
