"""Suggests changes of parameters with which a training stage fits on a GPU."""

from __future__ import annotations

import dataclasses
import math

from tasks.commands.plan_stages import Hardware, make_workload, stage_peak, stages_of
from tasks.settings.schema import Params

SMALLEST_PART = 1024  # tokens of a sequence per worker: with fewer, messages take longer than they save


def describe_changes(name: str, settings: Params, config, hardware: Hardware) -> dict:
    """What to change so that a stage fits, as plain values."""
    changes = find_changes(name, settings, config, hardware)
    return {"changes": changes, "shorter": find_shorter(name, settings, config, hardware, changes)}


def find_changes(name: str, settings: Params, config, hardware: Hardware) -> list[dict]:
    """Changes that make a stage fit, one after the other until it fits. Each has its parameters, and the bytes with it.

    Empty if the stage fits already or if nothing helps. The last entry says whether the stage fits then.
    """
    changes, total = [], stage_peak(name, settings, config).total
    while total > hardware.usable:
        for change in possible_changes(name, settings):
            changed = override(settings, change)
            changed_total = stage_peak(name, changed, config).total
            if changed_total < 0.99 * total:
                settings, total = changed, changed_total
                changes.append({"set": change, "total": total, "fits": total <= hardware.usable})
                break
        else:
            return changes
    return changes


def possible_changes(name: str, settings: Params) -> list[dict[str, object]]:
    """Changes to try, the cheapest first. None of them changes the number of tokens of a step."""
    stage, compute, execution = stages_of(settings)[name], settings.compute, settings.compute.execution
    workers, section = max(1, compute.workers), "parent.training" if name == "parent" else name
    changes = []
    if not execution.activation_checkpointing:
        changes.append({"compute.execution.activation_checkpointing": True})
    if stage.microbatches < (most := stage.batch_size // (workers // execution.context_parallel)):
        changes.append({f"{section}.microbatches": most})
    if compute.workers and execution.shard_over not in (None, workers):
        changes.append({"compute.execution.shard_over": None})
    if compute.workers and not execution.offload_teacher and make_workload(name, settings).has_teacher:
        changes.append({"compute.execution.offload_teacher": True})
    if (shared := shared_by_more(name, settings)) is not None:
        changes.append(shared)
    has_8bit_moments = any(stage.optimizer == "adamw8bit" for stage in stages_of(settings).values())
    if compute.workers and not execution.offload_student and not has_8bit_moments:
        changes.append({"compute.execution.offload_student": True})
    if (more := more_workers(settings, 2 * workers)) is not None:
        changes.append(more)
    return changes


def find_shorter(name: str, settings: Params, config, hardware: Hardware, changes: list[dict]) -> dict | None:
    """An alternative to more workers: shorter sequences that fit, with the same number of tokens per step.

    It includes those entries of `changes` that do not change the workers. None if no alternative is needed, and if the
    sequences cannot be halved often enough.
    """
    kept = [change["set"] for change in changes if "compute.workers" not in change["set"]]
    if len(kept) == len(changes) and (not changes or changes[-1]["fits"]):
        return None
    change = {key: value for values in kept for key, value in values.items()}
    section, total = "parent.training" if name == "parent" else name, math.inf
    while total > hardware.usable:
        stage = stages_of(override(settings, change))[name]
        if stage.sequence_length % 2:
            return None
        change |= {
            f"{section}.sequence_length": stage.sequence_length // 2,
            f"{section}.batch_size": stage.batch_size * 2,
            f"{section}.microbatches": stage.microbatches * 2,
        }
        total = stage_peak(name, override(settings, change), config).total
    return {"set": change, "total": total}


def shared_by_more(name: str, settings: Params) -> dict[str, object] | None:
    """Changes so that twice as many workers share each sequence, with half as many sequences in a microbatch.

    None if that is impossible, or if parts would have fewer than SMALLEST_PART tokens.
    """
    stage, sharing = stages_of(settings)[name], 2 * settings.compute.execution.context_parallel
    section = "parent.training" if name == "parent" else name
    lengths = [other.sequence_length for other in stages_of(settings).values()]
    if max(1, settings.compute.workers) % sharing or stage.batch_size % (2 * stage.microbatches):
        return None
    if any(length % sharing for length in lengths) or stage.sequence_length < sharing * SMALLEST_PART:
        return None
    return {"compute.execution.context_parallel": sharing, f"{section}.microbatches": 2 * stage.microbatches}


def more_workers(settings: Params, workers: int) -> dict[str, object] | None:
    """Changes for `workers` workers, so that every stage's batches divide evenly. Tokens per step stay the same.

    None if that is impossible.
    """
    changes: dict[str, object] = {"compute.workers": workers}
    groups = workers // settings.compute.execution.context_parallel  # of workers that share sequences
    for name, stage in stages_of(settings).items():
        size, section = stage.batch_size // stage.microbatches, "parent.training" if name == "parent" else name
        if stage.batch_size % groups:
            return None
        if size % groups:
            candidates = range(stage.microbatches, 0, -1)
            parts = next(n for n in candidates if stage.batch_size % n == 0 and stage.batch_size // n % groups == 0)
            changes[f"{section}.microbatches"] = parts
    rank = settings.rank
    if rank.batch_size % workers:
        batches, left = divmod(rank.batches * rank.batch_size, workers)
        if left or batches < rank.depth_batches:
            return None
        changes |= {"rank.batch_size": workers, "rank.batches": batches}
    return changes


def override(settings: Params, changes: dict[str, object]) -> Params:
    """A copy of `settings` with other values. `changes`: name in params.yaml, such as ``train_short.steps`` → value."""
    for key, value in changes.items():
        settings = _replace(settings, key.split("."), value)
    return settings


def _replace(section, path: list[str], value):
    key, *rest = path
    return dataclasses.replace(section, **{key: _replace(getattr(section, key), rest, value) if rest else value})
