"""Training: one loop for every stage. The parent's pretraining is a family of one, learning from text alone.

A step deals its microbatches to budgets; each runs one submodel against one teacher. While the router learns, its
distribution gates the full model; as soon as its choice has settled, a step computes with the slice it trains.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from elastic_core import checkpoint
from elastic_core.curriculum import Routing, Stage, deal, uses_trainable_teacher
from elastic_core.data import PackedSequences
from elastic_core.elastic_checkpoint import Member
from elastic_core.losses import distillation_loss, resource_loss
from elastic_core.model import ElasticModel
from elastic_core.router import Router, anneal, noise_generator
from elastic_core.selection import select_family

ADVICE = "lower learning_rate, or start from the last checkpoint with other data"


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a finite number; no step was taken with it, and the last checkpoint stays."""


@dataclass
class Run:
    """One stage's training run: what it trains, what it learns from, and how far it has come.

    `budgets` maps names to targets (fractions of the parent), largest first. With a `router` the submodels are still
    open; `members` names them once they are chosen, or from the start where they are given.
    """

    model: ElasticModel
    stage: Stage
    data: PackedSequences
    budgets: dict[str, float]
    members: dict[str, Member] | None = None
    router: Router | None = None
    routing: Routing = field(default_factory=Routing)
    teacher: ElasticModel | None = None
    seed: int = 0
    checkpoints: str | os.PathLike | None = None
    step: int = 0
    settled_for: int = 0
    last_choices: list[list[int]] | None = None
    indices: list[list[int]] | None = None

    def __post_init__(self):
        if (self.members is None) == (self.router is None):
            raise ValueError("Run: give either the members of the family or a router that chooses them")
        assert self.router is None or self.router.targets == tuple(self.budgets.values())
        check_budgets(self)
        check_teacher(self)
        self.optimizer = make_optimizer(self.model, self.router, self.stage, self.routing)
        self.frozen_teacher = None if self.teacher is None else self.teacher.requires_grad_(False).eval()


def check_budgets(run: Run) -> None:
    """Raise ValueError for a budget that the stage names and the family does not have."""
    for name in ("budget_shares", "loss_by_budget"):
        if unknown := sorted(set(getattr(run.stage, name)) - set(run.budgets)):
            raise ValueError(f"{name}: got {', '.join(unknown)}; allowed: the budgets {', '.join(run.budgets)}")


def check_teacher(run: Run) -> None:
    """Raise ValueError, before any work, where a budget would have no teacher, or a teacher nothing to learn from."""
    stage, shares = run.stage, run.stage.budget_shares or dict.fromkeys(run.budgets, 1.0)
    if run.teacher is run.model:
        raise ValueError("teacher: got the model itself, which would be frozen; load it twice, or use trainable")
    if run.teacher is not None and run.teacher.config.vocab_size != run.model.config.vocab_size:
        raise ValueError(
            f"teacher: has a vocabulary of {run.teacher.config.vocab_size}, the model one of "
            f"{run.model.config.vocab_size}; distillation needs a teacher with the model's own tokenizer"
        )
    for name in run.budgets:
        weights, share = stage.loss_of(name), shares.get(name, 0.0)
        if stage.teacher != "trainable" and run.teacher is None and share > 0 and weights.kl_weight > 0:
            raise ValueError(
                f"loss.kl_weight: got {weights.kl_weight} for budget {name}, but the {stage.teacher} teacher's model "
                "is not there; give one, or set kl_weight to 0 (and ce_weight above 0)"
            )
        if stage.teacher != "frozen" and run.budgets[name] == 1.0 and not (weights.ce_weight > 0 and share > 0):
            raise ValueError(
                f"teacher: got {stage.teacher}, but its own budget {name} has ce_weight {weights.ce_weight} and a "
                f"share of {share}; set both above 0 (loss_by_budget, budget_shares): it must itself learn from text"
            )
    if stage.teacher != "frozen" and 1.0 not in run.budgets.values():
        raise ValueError(f"teacher: got {stage.teacher}, which is the full budget; give budgets a 1.0, or use frozen")


def make_optimizer(model: ElasticModel, router: Router | None, stage: Stage, routing: Routing) -> torch.optim.AdamW:
    """AdamW with groups for decayed weights, everything else of the model, and the router.

    Gradients of what a step does not touch are None, not zero, so a layer that no microbatch of a step ran is moved
    neither by weight decay nor by stale momentum.
    """
    decayed = [p for p in model.parameters() if p.dim() == 2]
    plain = [p for p in model.parameters() if p.dim() != 2]
    groups = [
        {"params": decayed, "weight_decay": stage.weight_decay, "peak": stage.learning_rate},
        {"params": plain, "weight_decay": 0.0, "peak": stage.learning_rate},
    ]
    if router is not None:
        groups.append({"params": list(router.parameters()), "weight_decay": 0.0, "peak": routing.learning_rate})
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=stage.betas, fused=True)


def train(run: Run) -> Iterator[dict]:
    """Train to the end of the stage, resuming from the newest checkpoint; yields a row of metrics after every step.

    Killed at any moment and started again, it ends at the same weights, bit for bit. Raises NonFiniteError.
    """
    stage, model = run.stage, run.model
    resume(run)
    model.train()
    while run.step < stage.steps:
        start = time.perf_counter()
        for group in run.optimizer.param_groups:
            group["lr"] = group["peak"] * stage.learning_rate_factor(run.step)
        dealt = deal(stage.budget_shares or dict.fromkeys(run.budgets, 1.0), stage.microbatches, run.seed, run.step)
        results = []
        for microbatch, budget in enumerate(dealt):
            result = microbatch_loss(run, microbatch, budget)
            (result["total"] / len(dealt)).backward()
            numbers = {key: value.item() if isinstance(value, Tensor) else value for key, value in result.items()}
            results.append({"budget": budget} | numbers)
        check_losses(run, results)
        grad_norm = clip_gradients(run, dealt)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        mode = "hard" if run.members else "soft"
        run.step += 1
        if run.members is None:
            settle(run)
        if run.checkpoints and (run.step % stage.checkpoint_every == 0 or run.step == stage.steps):
            checkpoint.save(run.checkpoints, run.step, state_of(run), stage.keep_checkpoints)
        yield {
            "step": run.step,
            "tokens": stage.num_tokens(run.step),
            "mode": mode,
            "learning_rate": run.optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            "seconds": time.perf_counter() - start,
            "microbatches": results,
        }


def microbatch_loss(run: Run, microbatch: int, budget: str) -> dict:
    """Losses of one microbatch on one budget: `total` to differentiate, the rest for the eyes."""
    stage, size = run.stage, run.stage.batch_size // run.stage.microbatches
    first = run.step * stage.batch_size + microbatch * size
    input_ids, labels = run.data.batch(first, size)  # (size, L) each
    cut, router_loss, num_parameters = choose_cut(run, microbatch, budget)
    weights = stage.loss_of(budget)
    with precision(stage, input_ids.device):
        teacher, kl_weight = teacher_states(run, microbatch, budget, input_ids), weights.kl_weight
        hidden = run.model.hidden_states(input_ids, cut)
        loss, ce, kl = distillation_loss(
            hidden,
            run.model.head(cut),
            labels,
            teacher,
            weights.ce_weight,
            kl_weight if teacher is not None else 0.0,
            weights.temperature,
        )
    total = loss if router_loss is None else loss + run.routing.weight * router_loss
    result = {"total": total, "loss": loss.detach(), "ce": ce, "kl": kl, "num_parameters": num_parameters}
    return result if router_loss is None else result | {"router_loss": router_loss.detach()}


def choose_cut(run: Run, microbatch: int, budget: str):
    """The part of the model that this microbatch computes with, its resource loss, and its (expected) parameters."""
    if run.members is not None:
        submodel = run.members[budget].submodel
        return run.model.cut(submodel), None, None
    index, space = list(run.budgets).index(budget), run.router.space
    tau, scale = anneal(run.step / (run.routing.share * run.stage.steps), run.routing.temperatures, run.routing.scales)
    probs = run.router.probs(index, tau, scale, noise_generator(run.seed, run.step, microbatch))
    cost = space.cost(probs)
    target = run.budgets[budget] * space.num_parameters([0] * len(space.slots))
    loss = resource_loss(cost, target, run.routing.dead_zone)
    if run.routing.mode == "soft":
        return run.model.cut(gates=space.soft_gates(probs)), loss, cost.detach()
    indices = [int(prob.argmax()) for prob in probs]
    return run.model.cut(space.submodel(indices), space.hard_gates(probs, indices)), loss, cost.detach()


@torch.no_grad()
def teacher_states(run: Run, microbatch: int, budget: str, input_ids: Tensor) -> tuple[Tensor, Tensor] | None:
    """The teacher's hidden states and head: the frozen parent, or the family's own full model; None for no teacher.

    The full budget is not its own teacher: where the teacher is trainable it learns from the text alone.
    """
    if run.stage.loss_of(budget).kl_weight == 0:
        return None
    if not uses_trainable_teacher(run.stage, run.step, microbatch):
        if run.frozen_teacher is None:
            return None
        cut = run.frozen_teacher.cut()
        return run.frozen_teacher.hidden_states(input_ids, cut), run.frozen_teacher.head(cut)
    if run.budgets[budget] == 1.0:
        return None
    cut = run.model.cut()
    return run.model.hidden_states(input_ids, cut), run.model.head(cut)


def precision(stage: Stage, device: torch.device):
    """Autocast to the stage's compute type; weights, norms and the state space scan stay in float32."""
    if stage.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def check_losses(run: Run, results: list[dict]) -> None:
    """Stop before a non-finite loss reaches the weights."""
    for result in results:
        if not math.isfinite(result["total"]):
            raise NonFiniteError(f"step {run.step}, budget {result['budget']}: the loss is {result['total']}; {ADVICE}")


def clip_gradients(run: Run, dealt: list[str]) -> float:
    """Clip the model's gradient norm, and the router's by itself; returns the model's norm before.

    Stops where one is not finite, before clipping spreads it over every parameter.
    """
    norms = []
    for module in (run.model, run.router) if run.router is not None else (run.model,):
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        norm = nn.utils.get_total_norm(list(gradients.values()))
        if not norm.isfinite():
            bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
            raise NonFiniteError(
                f"step {run.step}, budgets {', '.join(sorted(set(dealt)))}: the gradient is not finite, "
                f"first in {bad[0] if bad else 'its norm'}; {ADVICE}"
            )
        nn.utils.clip_grads_with_norm_(module.parameters(), run.stage.gradient_clip, norm)
        norms.append(norm.item())
    return norms[0]


def settle(run: Run) -> None:
    """Fix the family when the router's choice has been the same, and within budget, for long enough, or time is up."""
    routing, choices = run.routing, run.router.choices()
    full = run.router.space.num_parameters([0] * len(run.router.space.slots))
    within = all(
        abs(run.router.space.num_parameters(choice) / (target * full) - 1) <= max(routing.dead_zone, 1e-3)
        for choice, target in zip(choices, run.router.targets, strict=True)
    )
    run.settled_for = run.settled_for + 1 if within and choices == run.last_choices else 0
    run.last_choices = choices
    if run.settled_for >= routing.settle_steps or run.step >= routing.share * run.stage.steps:
        run.indices = select_family(run.router, scale=routing.scales[1])
        run.members = members_of(run)


def members_of(run: Run) -> dict[str, Member]:
    """The chosen family by name."""
    submodels = [run.router.space.submodel(indices) for indices in run.indices]
    return {name: Member(run.budgets[name], s) for name, s in zip(run.budgets, submodels, strict=True)}


def state_of(run: Run) -> dict:
    """Everything that a resumed run needs; the data position is the step, the generators are functions of it."""
    return {
        "step": run.step,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "router": None if run.router is None else run.router.state_dict(),
        "settled_for": run.settled_for,
        "last_choices": run.last_choices,
        "indices": run.indices,
        "torch_rng": torch.get_rng_state(),
    }


def resume(run: Run) -> None:
    """Continue from the newest intact checkpoint, if there is one."""
    state = checkpoint.load_newest(run.checkpoints) if run.checkpoints else None
    if state is None:
        return
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.step, run.settled_for = state["step"], state["settled_for"]
    run.last_choices, run.indices = state["last_choices"], state["indices"]
    if run.router is not None:
        run.router.load_state_dict(state["router"])
        if run.indices is not None:
            run.members = members_of(run)
    torch.set_rng_state(state["torch_rng"])
