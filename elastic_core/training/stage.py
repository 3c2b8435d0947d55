"""The settings of a training stage, and what follows from them: budgets of microbatches, learning rate, teacher."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from elastic_core.config import Require, check_shares, require

# The fractional parts of its multiples 1, 2, 3, … are spread evenly over [0, 1).
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
# A router's choice may settle only after this share of the annealing. At a high learning rate, all probabilities are 1
# after some hundred steps, long before the task loss could have had an influence.
MIN_ANNEALED = 0.5
MAX_ENTROPY = 0.1  # of a slot whose choice may settle, as a share of the entropy of equal probabilities


@dataclass(frozen=True)
class Loss:
    """The weights of a budget's task loss, ce_weight·CE + kl_weight·T²·KL(teacher ‖ student) + state_weight·L_state.

    T is `temperature`. L_state is the distance of the student's states from the teacher's, see `state_matching`. It
    applies once the family is settled.
    """

    ce_weight: float = 0.0
    kl_weight: float = 1.0
    temperature: float = 1.0
    state_weight: float = 0.0

    def check(self, require: Require = require) -> None:
        require(self.ce_weight >= 0, "ce_weight", self.ce_weight, "0 or more")
        require(self.kl_weight >= 0, "kl_weight", self.kl_weight, "0 or more")
        require(self.ce_weight + self.kl_weight > 0, "kl_weight", self.kl_weight, "one weight above 0")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(self.state_weight >= 0, "state_weight", self.state_weight, "0 or more")


@dataclass(frozen=True)
class Routing:
    """How the router learns.

    The router learns until its choice has settled, but at most for `share` of the stage's steps. The choice has settled
    when it has been the same, and within the dead zone of every budget, for `settle_steps` steps. It cannot settle
    before `MIN_ANNEALED` of the annealing, nor before the entropy of every slot is below `MAX_ENTROPY`.

    - `learning_rate`: that of the router.
    - `weight`: λ in the total loss L_task + λ·L_router.
    - `mode`: ``soft``, gates that mix all choices, or ``hard``, the most probable choice with straight-through gates.
    - `temperatures`: the Gumbel-softmax temperature τ falls from the first to the second value over `share`.
    - `scales`: the logit scale s grows from the first to the second value over `share`.
    - `dead_zone`: relative deviation of the cost from the budget up to which L_router is 0.
    - `candidates`: how many combinations per budget are compared by measured KL when the choice is made. With 1, the
      router's most probable family is taken without a measurement.
    """

    learning_rate: float = 1e-2
    weight: float = 1.0
    share: float = 0.3
    mode: Literal["soft", "hard"] = "soft"
    temperatures: tuple[float, ...] = (1.0, 0.05)
    scales: tuple[float, ...] = (1.0, 10.0)
    dead_zone: float = 0.01
    settle_steps: int = 50
    candidates: int = 128

    def check(self, require: Require = require) -> None:
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        require(0 < self.share <= 1, "share", self.share, "above 0, up to 1")
        for name in ("temperatures", "scales"):
            pair = getattr(self, name)
            require(len(pair) == 2 and min(pair) > 0, name, pair, "[from, to], both above 0")
        require(0 <= self.dead_zone < 1, "dead_zone", self.dead_zone, "0 or more, below 1")
        require(self.settle_steps > 0, "settle_steps", self.settle_steps, "1 or more")
        require(self.candidates >= 1, "candidates", self.candidates, "1 or more")


@dataclass(frozen=True)
class Stage:
    """The settings of one training stage: a section of params.yaml.

    - A step takes `batch_size` sequences of `sequence_length` tokens, in `microbatches` equal parts. Each microbatch
      trains one budget, in the proportions of `budget_shares` (empty: all budgets alike).
    - `mixture`: the share of the sequences that comes from each data source (in params.yaml, empty: equal shares).
    - `learning_rate` is the peak. It is reached linearly in `warmup_steps` steps. Then `schedule` lowers it to
      `final_learning_rate` times the peak.
    - `precision`: the type in which matrices are multiplied. The optimizer always updates float32 weights.
    - `optimizer`: ``adamw``, or ``adamw8bit`` with moments of 8 bits for the matrices (package torchao).
    - `teacher`: ``frozen``, the parent; ``trainable``, the full budget of the model itself; ``mixed``, a linear change
      from the first to the second over the stage; or ``cached``, the parent's `kept_logits` most probable tokens at
      every position, which are computed before the first step and read from disk.
    - `loss`, and `loss_by_budget` for budgets with a loss of their own.
    - A checkpoint is written every `checkpoint_every` steps, and the newest `keep_checkpoints` are kept.
    - A step whose loss or gradient is not finite is skipped. More than `max_skipped_steps` in a row end the run.
    """

    sequence_length: int
    batch_size: int
    steps: int
    learning_rate: float
    mixture: dict[str, float] = field(default_factory=dict)
    budget_shares: dict[str, float] = field(default_factory=dict)
    microbatches: int = 1
    warmup_steps: int = 60
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    final_learning_rate: float = 0.1
    weight_decay: float = 0.01
    betas: tuple[float, ...] = (0.9, 0.95)
    gradient_clip: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    teacher: Literal["frozen", "trainable", "mixed", "cached"] = "frozen"
    kept_logits: int = 64
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    loss: Loss = Loss()
    loss_by_budget: dict[str, Loss] = field(default_factory=dict)
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    max_skipped_steps: int = 3

    def check(self, require: Require = require) -> None:
        for name in (
            *("sequence_length", "batch_size", "steps", "microbatches"),
            *("checkpoint_every", "keep_checkpoints"),
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        divides = self.microbatches < 1 or self.batch_size % self.microbatches == 0
        require(divides, "batch_size", self.batch_size, f"a multiple of microbatches ({self.microbatches})")
        require(self.kept_logits >= 1, "kept_logits", self.kept_logits, "1 or more")
        if self.teacher == "cached":
            self._check_cached(require)
        require(self.max_skipped_steps >= 0, "max_skipped_steps", self.max_skipped_steps, "0 or more")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        final = self.final_learning_rate
        require(0 <= final <= 1, "final_learning_rate", final, "0 to 1 of the peak")
        require(self.gradient_clip > 0, "gradient_clip", self.gradient_clip, "above 0")
        is_pair = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(is_pair, "betas", self.betas, "two numbers from 0 to below 1")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        for name in ("mixture", "budget_shares"):
            check_shares(name, getattr(self, name), require)

    def _check_cached(self, require: Require) -> None:
        """The cache holds what a frozen teacher says at one temperature, and none of its states."""
        of_budgets = {f"loss_by_budget.{budget}": loss for budget, loss in self.loss_by_budget.items()}
        for name, loss in {"loss": self.loss, **of_budgets}.items():
            require(loss.state_weight == 0, f"{name}.state_weight", loss.state_weight, "0 with teacher cached")
            same = loss.kl_weight == 0 or loss.temperature == self.loss.temperature
            allowed = f"that of loss ({self.loss.temperature}) with teacher cached"
            require(same, f"{name}.temperature", loss.temperature, allowed)

    def loss_of(self, budget: str) -> Loss:
        """The loss weights of a budget."""
        return self.loss_by_budget.get(budget, self.loss)

    def first_sample(self, step: int, microbatch: int) -> int:
        """The number of the microbatch's first sequence in the stage's data."""
        return step * self.batch_size + microbatch * (self.batch_size // self.microbatches)

    def num_tokens(self, steps: int | None = None) -> int:
        """The number of tokens in `steps` steps (None: in the whole stage)."""
        return (self.steps if steps is None else steps) * self.batch_size * self.sequence_length

    def learning_rate_factor(self, step: int) -> float:
        """The learning rate at `step` (0, 1, …), divided by the peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        fall = {"constant": 0.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}[self.schedule]
        return 1 - fall * (1 - self.final_learning_rate)


def assign_budgets(shares: dict[str, float], microbatches: int, seed: int, step: int) -> list[str]:
    """The budget of each microbatch of a step.

    It depends on the arguments only, so all ranks assign the same budgets. The assignment is stratified, not random: in
    any sequence of steps, the number of microbatches of a budget differs from its share by a few at most. To this end,
    evenly spaced points are looked up in the cumulative shares, and the points shift from step to step by the golden
    ratio. Only the order within a step is random.
    """
    names = [name for name in shares if shares[name] > 0]
    cumulative = list(itertools.accumulate(shares[name] for name in names))
    offset = (GOLDEN_RATIO * (seed + step + 1)) % 1
    points = [(i + offset) / microbatches * cumulative[-1] for i in range(microbatches)]
    assigned = [names[min(bisect.bisect_right(cumulative, point), len(names) - 1)] for point in points]
    np.random.default_rng([seed, step]).shuffle(assigned)
    return assigned


def uses_itself(stage: Stage) -> bool:
    """Whether the full budget of the model is a teacher at some time of the stage."""
    return stage.teacher in ("trainable", "mixed")


def uses_trainable_teacher(stage: Stage, shares: dict[str, float], seed: int, step: int, microbatch: int) -> bool:
    """Whether the teacher of this microbatch is the full budget of the model itself, and not the frozen parent.

    With teacher ``mixed``, the share of such microbatches rises linearly from 0 to 1 over the stage, for every budget
    alike: in any sequence of steps, each budget's number of them differs from the schedule by less than 2. It depends
    on the arguments only, so it is the same on all ranks. `shares` are those of `assign_budgets`.
    """
    if stage.teacher != "mixed":
        return stage.teacher == "trainable"
    return bool(_trainable_turns(tuple(shares.items()), stage.microbatches, seed, stage.steps)[step, microbatch])


@functools.lru_cache(maxsize=4)
def _trainable_turns(shares: tuple[tuple[str, float], ...], microbatches: int, seed: int, steps: int) -> np.ndarray:
    """Which microbatches of a stage have the trainable teacher, if teachers are mixed: (steps, microbatches) bool.

    For each budget, the scheduled shares of its microbatches are summed. Whenever the sum passes another whole number
    (plus a half), it is the turn of the trainable teacher.
    """
    budgets = np.array([assign_budgets(dict(shares), microbatches, seed, step) for step in range(steps)]).flatten()
    scheduled = np.repeat(np.arange(steps) / steps, microbatches)
    turns = np.zeros(len(budgets), dtype=bool)
    for name, _ in shares:
        of_budget = budgets == name
        turns[of_budget] = np.diff(np.floor(scheduled[of_budget].cumsum() + 0.5), prepend=0) > 0
    return turns.reshape(steps, microbatches)
