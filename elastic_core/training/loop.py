"""The training loop of every stage.

A step has several microbatches, and each microbatch trains one budget:

1. `choose_slice` gives the part of the model to compute with. While the router learns, this is the full model with
   gates from the router's distribution (soft mode). Once the choice has settled, it is the slice of the budget's
   submodel, so a smaller budget costs less.
2. `microbatch_loss` computes the task loss: distillation from a teacher, cross-entropy on the text, matching of the
   teacher's states, or several of these.
3. While the router learns, the resource loss (eq. 12) is added: the deviation of the expected cost from the budget.

After all microbatches, the optimizer updates the weights, which all budgets share, and the router. `settle` decides
when the choice is final. Then the router's candidates are compared by measured KL (candidates.py). All ranks train the
same budget in the same microbatch, on different sequences.

The pretraining of a small parent uses the same loop: its only budget is the full model, and it has no teacher.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from elastic_core.data.loader import IGNORED_LABEL, Batch
from elastic_core.model.ops.device_copy import to_device
from elastic_core.training.checkpoint import Checkpoints
from elastic_core.training.diagnosis import NonFiniteError, explain_gradient, explain_loss
from elastic_core.training.distributed.gradients import average_gradients, clip_gradients, gradient_norm
from elastic_core.training.distributed.placement import reduce_in_last
from elastic_core.training.losses import distillation_loss
from elastic_core.training.routing import choose_slice, kept_layers, router_entropy, settle
from elastic_core.training.run import Run, matches_states, precision, resume, save, teacher_of, trained_modules
from elastic_core.training.stage import assign_budgets
from elastic_core.training.state_matching import StateMatching

LOSSES = ("loss", "ce", "kl", "state")  # the numbers of a microbatch that are summed over ranks


def train(run: Run) -> Iterator[dict]:
    """Train to the end of the stage, from the newest checkpoint if there is one. Yields a row of metrics per step.

    A row is that of `train_step`; while the router learns, it also has `entropy`, see `router_entropy`.

    If a run is killed at any moment and started again with the same number of ranks, it ends with the same weights, bit
    for bit. With another number of ranks, the weights are equal up to rounding.

    A step whose loss or gradient is not finite does not change the weights. Raises NonFiniteError after more than
    `stage.max_skipped_steps` such steps in a row. Raises CheckpointError if a checkpoint cannot be written or read.
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
                row["entropy"] = router_entropy(run)
                settle(run, row["entropy"])
            yield row | {"memory_bytes": peak_memory(run.ranks.device), "seconds": time.perf_counter() - start}
            # Save only after the caller has taken the row: a run that resumes from here does not yield it again.
            if checkpoints and (run.step % stage.checkpoint_every == 0 or run.step == stage.steps):
                save(run, checkpoints)
    finally:
        if checkpoints:
            checkpoints.wait()


def train_step(run: Run) -> dict:
    """Do one step of the optimizer. Returns its row of metrics, which is the same on every rank.

    In the row: `tokens` and `skipped` steps of the stage so far; `mode`, "soft" while the router learns, then "hard";
    `budgets`, see `means_by_budget`; `microbatches`, see `fetch_numbers`. Losses are in nats per token.
    """
    stage, modules = run.stage, trained_modules(run)
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak"] * stage.learning_rate_factor(run.step)
    assigned = assign_budgets(run.shares, stage.microbatches, run.seed, run.step)
    mode = "hard" if run.members else "soft"
    results = accumulate_gradients(run, assigned)
    # On a GPU, the router's gradients are made of numbers that are read together with the losses.
    is_late = any(result["gates"] is not None for result in results)
    average_gradients([module for name, module in modules.items() if not (is_late and name == "router")], run.ranks)
    norm = gradient_norm(gradients_to_clip(modules)[0])
    microbatches, model_norm, gate_gradients = fetch_numbers(run, assigned, results, norm)
    if is_late:
        router_backward(run, results, gate_gradients)
        average_gradients([run.router], run.ranks)
    gradients = gradients_to_clip(modules)
    norms = [norm, *(gradient_norm(part) for part in gradients[1:])]
    norm_values = [model_norm, *(part.item() for part in norms[1:])]
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


def gradients_to_clip(modules: dict[str, nn.Module]) -> list[list[Tensor]]:
    """Gradients that are clipped together: those of the model and of the budgets' norms; those of the router."""
    parts = {"model": [], "router": []}
    for name, module in modules.items():
        gradients = parts["router" if name == "router" else "model"]
        gradients += [p.grad for p in module.parameters() if p.grad is not None]
    return [gradients for name, gradients in parts.items() if name in modules]


def accumulate_gradients(run: Run, assigned: list[str]) -> list[dict]:
    """Run forward and backward pass of every microbatch. `assigned`: the budget of each. Returns this rank's losses.

    On a GPU, `router_backward` must follow for the gradients of a router.

    With FSDP, a block reduces its gradients over ranks after every microbatch that runs it, and not only in the last
    microbatch: the budget of the last one may not keep this layer, and then its gradients would never be reduced. With
    `reduce_once`, it does so after the last microbatch that runs it.
    """
    layers = kept_layers(run, assigned) if run.execution.reduce_once and run.ranks.is_distributed else None
    batches = [microbatch_data(run, microbatch) for microbatch in range(len(assigned))]
    num_labelled = run.ranks.sum(torch.stack([(batch.labels != IGNORED_LABEL).sum() for batch in batches])).clamp(min=1)
    results = []
    for microbatch, (budget, batch) in enumerate(zip(assigned, batches, strict=True)):
        result = microbatch_loss(run, microbatch, budget, batch, num_labelled[microbatch])
        # Each rank's loss is its part of a sum over ranks. Gradients are averaged over ranks, which divides by `world`.
        if layers is not None:
            reduce_in_last(run.model, layers, microbatch)
        total = run.ranks.world * result["loss"]
        if result["router_loss"] is not None and result["gates"] is None:
            total = total + run.routing.weight * result["router_loss"]
        (total / len(assigned)).backward()
        results.append({key: value.detach() if isinstance(value, Tensor) else value for key, value in result.items()})
    return results


def router_backward(run: Run, results: list[dict], gate_gradients: list[Tensor]) -> None:
    """The router's part of the backward pass on a GPU. `gate_gradients` (CPU memory) are those of every microbatch."""
    gates = [result["gates"] for result in results if result["gates"] is not None]
    for of_microbatch, gradient in zip(gates, gate_gradients, strict=True):
        of_microbatch.backward(gradient, run.routing.weight / len(results))


def microbatch_data(run: Run, microbatch: int) -> Batch:
    """This rank's sequences of a microbatch: tensors (B, L) in CPU memory.

    B is `batch_size` divided by `microbatches` and by the number of ranks, if no ranks share sequences.
    """
    return run.batch(run.stage.first_sample(run.step, microbatch), run.stage.batch_size // run.stage.microbatches)


def microbatch_loss(run: Run, microbatch: int, budget: str, batch: Batch, num_labelled: Tensor) -> dict:
    """The losses of one microbatch, which trains one budget.

    Returns `loss` and `router_loss` (with gradients), and for the metrics `ce`, `kl`, `state` and `cost` (without);
    and `gates`, see `Choice`.
    `loss`, `ce`, `kl` and `state` are this rank's parts of a mean over the `num_labelled` () positions that all ranks
    have together. `state` is None where no states are matched. `router_loss` and `cost` are None once the router's
    choice has settled.
    """
    weights, device = run.stage.loss_of(budget), run.ranks.device
    input_ids, labels = to_device(batch.input_ids, device), to_device(batch.labels, device)
    documents = run.documents(batch, input_ids)
    sliced, router_loss, cost, gates = choose_slice(run, microbatch, budget)
    model, matching = teacher_of(run, microbatch, budget), None
    teacher = run.cached_logits(microbatch) if weights.kl_weight > 0 else None
    if model is not None and matches_states(run, budget):
        matching = StateMatching(run.model.config, sliced, labels, num_labelled)
    with precision(run.stage, device):
        if model is not None:
            with torch.no_grad():
                record = None if matching is None else matching.record
                teacher_hidden = model.hidden_states(input_ids, run.slice_of(model), documents, record)
        hidden = run.model.hidden_states(input_ids, sliced, documents, None if matching is None else matching.match)
        if model is not None and weights.kl_weight > 0:
            # Read the teacher's head after a forward pass: only then are the shards of the head gathered.
            teacher = teacher_hidden, model.head(run.slice_of(model))
        loss, ce, kl = distillation_loss(
            hidden,
            run.model.head(sliced),
            labels,
            teacher,
            weights.ce_weight,
            weights.kl_weight if teacher is not None else 0.0,
            weights.temperature,
            num_labelled=num_labelled,
        )
    result = {"loss": loss, "ce": ce, "kl": kl, "state": None}
    result |= {"cost": cost, "router_loss": router_loss, "gates": gates}
    if matching is not None:
        state = matching.loss()
        result |= {"loss": loss + weights.state_weight * state, "state": state}
    return result


def fetch_numbers(
    run: Run, assigned: list[str], results: list[dict], model_norm: Tensor
) -> tuple[list[dict], float, list[Tensor]]:
    """Copy the step's numbers to the CPU: (a dict per microbatch, norm of the model's gradients, gradients of gates).

    This is the only moment at which a step waits for the GPU. Losses are summed over ranks. A microbatch's `total` is
    the loss that was differentiated: `loss` plus the weighted `router_loss`. It has `state` only where states are
    matched. The router's numbers are already in CPU memory, and the same on every rank. The gradients of the gates are
    those of every microbatch that has its gates on a GPU.
    """
    names = [[name for name in LOSSES if result[name] is not None] for result in results]
    found = [result[name] for result, part in zip(results, names, strict=True) for name in part]
    losses = run.ranks.sum(torch.stack(found).double())
    gates = [result["gates"].leaf.grad for result in results if result["gates"] is not None]
    numbers = [losses, model_norm.double().view(1).to(losses.device), *(gradient.double() for gradient in gates)]
    losses, norm, *gate_gradients = torch.cat(numbers).cpu().split([len(part) for part in numbers])
    microbatches, values = [], iter(losses.tolist())
    for budget, result, part in zip(assigned, results, names, strict=True):
        row_values = {name: next(values) for name in part}
        row = {"budget": budget, "total": row_values["loss"], **row_values, "cost": None}
        if result["router_loss"] is not None:
            row["cost"], row["router_loss"] = result["cost"].item(), result["router_loss"].item()
            row["total"] += run.routing.weight * row["router_loss"]
        microbatches.append(row)
    return microbatches, norm.item(), gate_gradients


def means_by_budget(run: Run, microbatches: list[dict]) -> dict[str, dict]:
    """For each budget of the step: mean `loss`, `ce` and `kl`, and `budget_error`, |C/Ĉ − 1|.

    If states are matched, also `state`, the mean over the microbatches that have it.
    """
    means = {}
    for budget in dict.fromkeys(row["budget"] for row in microbatches):
        rows = [row for row in microbatches if row["budget"] == budget]
        values = {key: [row[key] for row in rows if key in row] for key in LOSSES}
        means[budget] = {key: sum(found) / len(found) for key, found in values.items() if found}
        cost = rows[-1]["cost"]
        if cost is None:
            cost = run.member_cost(budget)
        means[budget]["budget_error"] = abs(cost / (run.budgets[budget] * run.parent_cost) - 1)
    return means


def skip_step(run: Run, microbatches: list[dict]) -> None:
    """Count a step that must not change the weights, because a loss or gradient is not finite.

    Raises NonFiniteError, with a diagnosis, after too many such steps in a row.
    """
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
        raise NonFiniteError(explain_loss(run, bad, microbatches[bad], sliced, microbatch_data(run, bad)))


def peak_memory(device: torch.device) -> int:
    """The peak memory so far, in bytes: of the tensors on a GPU; without a GPU, of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
