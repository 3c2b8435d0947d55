"""Training: one loop for every stage. The parent's pretraining is a family of one, learning from text alone.

A step deals its microbatches to budgets; each runs one submodel against one teacher. While the router learns, its
distribution gates the full model; as soon as its choice has settled, a step computes with the slice it trains.
Several ranks take the same budget in the same microbatch, each its own sequences of it.
"""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from elastic_core.data.loader import IGNORED_LABEL
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.search.router import anneal, noise_generator
from elastic_core.search.selection import select_family
from elastic_core.training.checkpoint import Checkpoints
from elastic_core.training.diagnosis import NonFiniteError, explain_gradient, explain_loss
from elastic_core.training.distributed.gradients import average_gradients, clip_gradients, gradient_norm
from elastic_core.training.losses import distillation_loss, resource_loss
from elastic_core.training.run import Run, members_of, resume, save, trained_modules
from elastic_core.training.stage import Stage, deal, uses_trainable_teacher


def train(run: Run) -> Iterator[dict]:
    """Train to the end of the stage, resuming from the newest checkpoint; yields a row of metrics after every step.

    Killed at any moment and started again with as many ranks, it ends at the same weights, bit for bit; with another
    number of them it goes on to rounding. A step whose loss or gradient is not finite changes nothing and is counted;
    after more than `stage.max_skipped_steps` in a row, raises NonFiniteError. Raises CheckpointError.
    """
    stage, model = run.stage, run.model
    checkpoints = Checkpoints(run.checkpoints, stage.keep_checkpoints, run.ranks) if run.checkpoints else None
    if checkpoints:
        resume(run, checkpoints)
    model.train()
    try:
        while run.step < stage.steps:
            start = time.perf_counter()
            row = train_step(run)
            if run.members is None:
                settle(run)
            yield row | {"memory_bytes": peak_memory(run.ranks.device), "seconds": time.perf_counter() - start}
            # Not before its row has been taken: a run that goes on from here will not yield it again.
            if checkpoints and (run.step % stage.checkpoint_every == 0 or run.step == stage.steps):
                save(run, checkpoints)
    finally:
        if checkpoints:
            checkpoints.wait()


def train_step(run: Run) -> dict:
    """One step of the optimizer, and its row of metrics: the same on every rank."""
    stage, modules = run.stage, trained_modules(run)
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak"] * stage.learning_rate_factor(run.step)
    shares = stage.budget_shares or dict.fromkeys(run.budgets, 1.0)
    dealt = deal(shares, stage.microbatches, run.seed, run.step)
    mode = "hard" if run.members else "soft"
    results = accumulate_gradients(run, dealt)
    average_gradients(modules, run.ranks)
    gradients = [[p.grad for p in module.parameters() if p.grad is not None] for module in modules]
    norms = [gradient_norm(part) for part in gradients]
    microbatches, norm_values = read_out(run, dealt, results, norms)
    if all(map(math.isfinite, [*norm_values, *(result["total"] for result in microbatches)])):
        for part, norm in zip(gradients, norms, strict=True):
            clip_gradients(part, stage.gradient_clip, norm)
        run.optimizer.step()
        run.skipped_in_a_row = 0
    else:
        skip_step(run, microbatches)
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return {
        "step": run.step,
        "tokens": stage.num_tokens(run.step),
        "mode": mode,
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "grad_norm": norm_values[0],
        "skipped": run.skipped,
        "budgets": means_by_budget(run, microbatches),
        "microbatches": microbatches,
    }


def accumulate_gradients(run: Run, dealt: list[str]) -> list[dict]:
    """Forward and backward of every microbatch; what each has lost, on this rank.

    Blocks reduce their gradients after every microbatch: one that the last microbatch skips would otherwise keep its
    own to itself.
    """
    batches = [microbatch_data(run, microbatch) for microbatch in range(len(dealt))]
    num_live = run.ranks.sum(torch.stack([(labels != IGNORED_LABEL).sum() for _, labels in batches])).clamp(min=1)
    results = []
    for microbatch, (budget, (input_ids, labels)) in enumerate(zip(dealt, batches, strict=True)):
        result = microbatch_loss(run, microbatch, budget, input_ids, labels, num_live[microbatch])
        total = run.ranks.world * result["loss"]  # gradients are averaged over ranks, losses are parts of a sum
        if result["router_loss"] is not None:
            total = total + run.routing.weight * result["router_loss"]
        (total / len(dealt)).backward()
        results.append({key: value.detach() if isinstance(value, Tensor) else value for key, value in result.items()})
    return results


def microbatch_data(run: Run, microbatch: int) -> tuple[Tensor, Tensor]:
    """This rank's input ids and labels of a microbatch, (size / ranks, L) each, in CPU memory."""
    part = run.ranks.part(run.stage.batch_size // run.stage.microbatches)
    return run.data.batch(run.stage.first_sample(run.step, microbatch) + part.start, part.stop - part.start)


def microbatch_loss(
    run: Run, microbatch: int, budget: str, input_ids: Tensor, labels: Tensor, num_live: Tensor
) -> dict:
    """Losses of one microbatch on one budget: `loss` and `router_loss` to differentiate, the rest for the eyes.

    `loss`, `ce` and `kl` are this rank's parts of means over the `num_live` positions that all ranks have together.
    """
    weights, device = run.stage.loss_of(budget), run.ranks.device
    input_ids, labels = input_ids.to(device), labels.to(device)
    sliced, router_loss, cost = choose_slice(run, microbatch, budget)
    with precision(run.stage, device):
        teacher = teacher_states(run, microbatch, budget, input_ids)
        hidden = run.model.hidden_states(input_ids, sliced)
        if teacher is not None:
            model, states = teacher
            teacher = states, model.head(run.slice_of(model))  # after a forward pass, which gathers a sharded head
        loss, ce, kl = distillation_loss(
            hidden,
            run.model.head(sliced),
            labels,
            teacher,
            weights.ce_weight,
            weights.kl_weight if teacher is not None else 0.0,
            weights.temperature,
            num_live=num_live,
        )
    return {"loss": loss, "ce": ce, "kl": kl, "cost": cost, "router_loss": router_loss}


def choose_slice(run: Run, microbatch: int, budget: str):
    """The part of the model that this microbatch computes with, its resource loss, and its expected cost."""
    if run.members is not None:
        return run.slice_of(run.model, run.members[budget].submodel), None, None
    index, space = list(run.budgets).index(budget), run.router.space
    tau, scale = anneal(run.step / (run.routing.share * run.stage.steps), run.routing.temperatures, run.routing.scales)
    probs = run.router.probs(index, tau, scale, noise_generator(run.seed, run.step, microbatch))
    cost = space.cost(probs)
    loss = resource_loss(cost, run.budgets[budget] * run.parent_cost, run.routing.dead_zone)
    if run.routing.mode == "soft":
        return run.model.slice(gates=space.soft_gates(probs)), loss, cost.detach()
    indices = [int(prob.argmax()) for prob in probs]
    return run.model.slice(space.submodel(indices), space.hard_gates(probs, indices)), loss, cost.detach()


@torch.no_grad()
def teacher_states(run: Run, microbatch: int, budget: str, input_ids: Tensor) -> tuple[ElasticModel, Tensor] | None:
    """The teacher, frozen parent or the family's own full model, and its hidden states; None for no teacher.

    The full budget is not its own teacher: where the teacher is trainable, the full budget learns from text alone.
    """
    model = run.frozen_teacher
    if uses_trainable_teacher(run.stage, run.step, microbatch):
        model = None if run.budgets[budget] == 1.0 else run.model
    if model is None or run.stage.loss_of(budget).kl_weight == 0:
        return None
    return model, model.hidden_states(input_ids, run.slice_of(model))


def precision(stage: Stage, device: torch.device):
    """Autocast to the stage's compute type; weights, norms and the state space scan stay in float32."""
    if stage.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def read_out(run: Run, dealt: list[str], results: list[dict], norms: list[Tensor]) -> tuple[list[dict], list[float]]:
    """Numbers of every microbatch over all ranks, and gradient norms: the one moment that a step waits for the device.

    A microbatch's `total` is what was differentiated. The router's numbers are in CPU memory, alike on every rank.
    """
    losses = run.ranks.sum(torch.stack([torch.stack([r["loss"], r["ce"], r["kl"]]) for r in results]).double())
    *losses, model_norm = torch.cat([losses.flatten(), norms[0].double().view(1).to(losses.device)]).tolist()
    microbatches = []
    for i, (budget, result) in enumerate(zip(dealt, results, strict=True)):
        loss, ce, kl = losses[3 * i : 3 * i + 3]
        row = {"budget": budget, "total": loss, "loss": loss, "ce": ce, "kl": kl, "cost": None}
        if result["router_loss"] is not None:
            row["cost"], row["router_loss"] = result["cost"].item(), result["router_loss"].item()
            row["total"] += run.routing.weight * row["router_loss"]
        microbatches.append(row)
    return microbatches, [model_norm, *(norm.item() for norm in norms[1:])]


def means_by_budget(run: Run, microbatches: list[dict]) -> dict[str, dict]:
    """Mean losses of the step's budgets, and how far each is from its target: |C/Ĉ − 1|."""
    means = {}
    for budget in dict.fromkeys(row["budget"] for row in microbatches):
        rows = [row for row in microbatches if row["budget"] == budget]
        means[budget] = {key: sum(row[key] for row in rows) / len(rows) for key in ("loss", "ce", "kl")}
        cost = rows[-1]["cost"]
        if cost is None:
            cost = run.member_cost(budget)
        means[budget]["budget_error"] = abs(cost / (run.budgets[budget] * run.parent_cost) - 1)
    return means


def skip_step(run: Run, microbatches: list[dict]) -> None:
    """Count a step that must not reach the weights; too many in a row end the run, and say what is known about them."""
    run.skipped += 1
    run.skipped_in_a_row += 1
    if run.skipped_in_a_row <= run.stage.max_skipped_steps:
        return
    is_bad = [not math.isfinite(row["total"]) for row in microbatches]
    if not any(is_bad):
        raise NonFiniteError(explain_gradient(run, microbatches))
    bad = is_bad.index(True)
    sliced, *_ = choose_slice(run, bad, microbatches[bad]["budget"])
    with precision(run.stage, run.ranks.device), torch.no_grad():
        raise NonFiniteError(explain_loss(run, bad, microbatches[bad], sliced, microbatch_data(run, bad)[0]))


def settle(run: Run) -> None:
    """Fix the family when the router's choice has been the same, and within budget, for long enough, or time is up."""
    routing, choices = run.routing, run.router.choices()
    within = all(
        abs(run.router.space.exact_cost(choice) / (target * run.parent_cost) - 1) <= max(routing.dead_zone, 1e-3)
        for choice, target in zip(choices, run.router.targets, strict=True)
    )
    run.settled_for = run.settled_for + 1 if within and choices == run.last_choices else 0
    run.last_choices = choices
    if run.settled_for >= routing.settle_steps or run.step >= routing.share * run.stage.steps:
        run.indices = select_family(run.router, scale=routing.scales[1])
        run.members = members_of(run)


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use: on a GPU of its tensors, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
