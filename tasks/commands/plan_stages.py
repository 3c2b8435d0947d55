"""What a training stage takes, for `elastic plan`: memory of a worker, operations, hours, and what to change."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

from elastic_core.config import require
from elastic_core.cost.budgets import parse
from elastic_core.cost.metrics import num_parameters
from elastic_core.errors import UserError
from elastic_core.model.submodel import Submodel, full_submodel
from elastic_core.training.estimate.flops import pass_flops
from elastic_core.training.estimate.piece_memory import Pieces, Setting
from elastic_core.training.estimate.step_memory import Load, Peak, step_peak
from elastic_core.training.stage import Stage
from tasks.settings.schema import Compute, Params

RESERVE = 0.1  # of a GPU, for what allocator, libraries and CUDA take
PEAKS = {"bfloat16": 989e12, "float32": 67e12}  # FLOP/s of one H100 SXM, dense, as its data sheet says


@dataclass(frozen=True)
class Hardware:
    """What a plan is made for: bytes of a GPU, the share of its peak that training reaches, and FLOP/s of that peak.

    `peak` None: as PEAKS has it for a stage's precision, on GPUs; without GPUs no hours are told.
    """

    memory: float = 80e9
    utilisation: float = 0.4
    peak: float | None = None

    def __post_init__(self):
        require(self.memory > 0, "gpu-memory", self.memory, "above 0")
        require(0 < self.utilisation <= 1, "utilisation", self.utilisation, "above 0, up to 1")
        require(self.peak is None or self.peak > 0, "peak", self.peak, "above 0")

    @classmethod
    def read(cls, memory: str, utilisation: float, teraflops: float | None) -> Hardware:
        """From `memory` as '80GB', '141 GB' or '80GiB', and a peak in TFLOP/s."""
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB)\s*", memory)
        if found is None:
            raise UserError(f"gpu-memory: got {memory!r}; allowed: a size such as 80GB or 80GiB")
        unit = {"GB": 1e9, "GiB": 2.0**30}[found[2]]
        return cls(float(found[1]) * unit, utilisation, None if teraflops is None else 1e12 * teraflops)

    @property
    def usable(self) -> float:
        return (1 - RESERVE) * self.memory


def describe_stage(
    name: str, settings: Params, config, members: dict[str, Submodel], hardware: Hardware, pieces: dict
) -> dict:
    """Everything about one stage; `pieces` remembers between stages what has been counted."""
    peak = stage_peak(name, settings, config, pieces)
    changes = find_changes(name, settings, config, hardware, pieces)
    return {
        **describe_load(name, settings),
        "memory": peak.kinds,
        "total": peak.total,
        "moment": peak.moment,
        "fits": peak.total <= hardware.usable,
        **describe_work(name, settings, config, members, hardware),
        "changes": changes,
        "shorter": find_shorter(name, settings, config, hardware, pieces, changes),
    }


def stages_of(settings: Params) -> dict[str, Stage]:
    """The stages that train, in order."""
    own = {} if settings.parent.training is None else {"parent": settings.parent.training}
    return {**own, "train_short": settings.train_short, "train_extended": settings.train_extended}


def learns_softly(name: str, settings: Params) -> bool:
    """Whether a stage begins with the router's soft masks, at full size."""
    return name == "train_short" and settings.routing.mode == "soft"


def use_gpus(compute: Compute) -> bool:
    return compute.gpus_per_worker > 0


def describe_load(name: str, settings: Params) -> dict:
    stage, load = stages_of(settings)[name], make_load(name, settings)
    return {
        "workers": max(1, settings.compute.workers),
        "shards": load.shards,
        "sequences": load.sequences,
        "sequence_length": load.length,
        "microbatches": stage.microbatches,
        "precision": stage.precision,
        "activation_checkpointing": settings.compute.execution.activation_checkpointing,
    }


def make_load(name: str, settings: Params) -> Load:
    """What one worker computes at a time in a stage."""
    stage, workers = stages_of(settings)[name], max(1, settings.compute.workers)
    shards = settings.compute.execution.shard_over or workers
    sequences = stage.batch_size // stage.microbatches // workers
    has_teacher = name != "parent" and stage.teacher != "trainable"
    return Load(sequences, stage.sequence_length, shards, stage.microbatches > 1, has_teacher)


def stage_peak(name: str, settings: Params, config, pieces: dict) -> Peak:
    """The most a worker holds in a stage; `pieces` remembers what has been counted."""
    stage, compute = stages_of(settings)[name], settings.compute
    setting = Setting(stage.precision, compute.execution, compute.workers > 0, use_gpus(compute))
    gates = learns_softly(name, settings)
    if (setting, gates) not in pieces:
        pieces[setting, gates] = Pieces(config, setting, gates)
    return step_peak(pieces[setting, gates], make_load(name, settings))


def describe_work(name: str, settings: Params, config, members: dict[str, Submodel], hardware: Hardware) -> dict:
    """Tokens, operations by kind, and hours. Recomputation counts: utilisation is of everything that is computed."""
    stage, compute = stages_of(settings)[name], settings.compute
    work, length, on_gpu = (
        dict.fromkeys(("student", "recomputed", "teacher"), 0.0),
        stage.sequence_length,
        use_gpus(compute),
    )
    shares = {"parent": 1.0} if name == "parent" else stage.budget_shares or dict.fromkeys(settings.budgets, 1.0)
    soft = settings.routing.share if learns_softly(name, settings) else 0.0
    whole = pass_flops(config, length, on_gpu=on_gpu)
    for budget, share in shares.items():
        sequences = share / sum(shares.values()) * stage.steps * stage.batch_size
        for submodel, part in ((full_submodel(config), soft), (members.get(budget, full_submodel(config)), 1 - soft)):
            once = pass_flops(config, length, submodel, on_gpu)
            work["student"] += sequences * part * (once.forward + once.backward)
            if compute.execution.activation_checkpointing:  # all but the head
                head = 2 * length * config.vocab_size * submodel.hidden_size
                work["recomputed"] += sequences * part * (once.forward - head)
        work["teacher"] += sequences * taught_share(name, stage, settings, budget) * whole.forward
    total, peak = sum(work.values()), hardware.peak
    if peak is None and on_gpu:
        peak = PEAKS[stage.precision]
    hours = None if peak is None else total / (peak * hardware.utilisation) / 3600
    return {
        "tokens": stage.num_tokens(),
        "steps": stage.steps,
        "flops": work,
        "peak": peak,
        "gpu_hours": hours,
        "hours": None if hours is None else hours / max(1, compute.workers),
    }


def taught_share(name: str, stage: Stage, settings: Params, budget: str) -> float:
    """Of a budget's microbatches, those in which a teacher runs: not in a full budget's that is the teacher itself."""
    if name == "parent" or stage.loss_of(budget).kl_weight == 0:
        return 0.0
    own = {"frozen": 0.0, "mixed": 0.5, "trainable": 1.0}[stage.teacher]
    return 1.0 - own if parse(settings.budgets[budget]).is_full else 1.0


def describe_rank(config, hardware: Hardware) -> dict:
    """Calibration holds the whole parent in float32 on every worker, and for depth the head in float64 too."""
    total = 4.0 * num_parameters(config) + 8.0 * config.vocab_size * config.hidden_size
    return {"at_least": total, "fits": total <= hardware.usable}


# --- what to change --------------------------------------------------------------------------------------------------


def find_changes(name: str, settings: Params, config, hardware: Hardware, pieces: dict) -> list[dict]:
    """What makes a stage fit that does not, one change after the other until it does: parameters, and bytes then."""
    changes, total = [], stage_peak(name, settings, config, pieces).total
    while total > hardware.usable:
        for change in possible_changes(name, settings):
            changed = override(settings, change)
            less = stage_peak(name, changed, config, pieces).total
            if less < 0.99 * total:
                settings, total = changed, less
                changes.append({"set": change, "total": total, "fits": total <= hardware.usable})
                break
        else:
            return changes
    return changes


def possible_changes(name: str, settings: Params) -> list[dict[str, object]]:
    """Changes to try, those that cost least first; the number of tokens of a step stays."""
    stage, compute, execution = stages_of(settings)[name], settings.compute, settings.compute.execution
    workers, section = max(1, compute.workers), "parent.training" if name == "parent" else name
    changes = []
    if not execution.activation_checkpointing:
        changes.append({"compute.execution.activation_checkpointing": True})
    if stage.microbatches < (most := stage.batch_size // workers):
        changes.append({f"{section}.microbatches": most})
    if compute.workers and execution.shard_over not in (None, workers):
        changes.append({"compute.execution.shard_over": None})
    if compute.workers and not execution.offload_teacher and make_load(name, settings).has_teacher:
        changes.append({"compute.execution.offload_teacher": True})
    if (more := more_workers(settings, 2 * workers)) is not None:
        changes.append(more)
    return changes


def find_shorter(
    name: str, settings: Params, config, hardware: Hardware, pieces: dict, changes: list[dict]
) -> dict | None:
    """Instead of more workers, shorter sequences that fit, a step's tokens staying; None where none are asked for.

    On top of those of `changes` that leave the workers as they are.
    """
    given = [change["set"] for change in changes if "compute.workers" not in change["set"]]
    if len(given) == len(changes) and (not changes or changes[-1]["fits"]):
        return None
    change = {key: value for values in given for key, value in values.items()}
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
        total = stage_peak(name, override(settings, change), config, pieces).total
    return {"set": change, "total": total}


def more_workers(settings: Params, workers: int) -> dict[str, object] | None:
    """What makes every stage's batches divide by so many workers, a step's tokens staying; None if nothing does."""
    changes: dict[str, object] = {"compute.workers": workers}
    for name, stage in stages_of(settings).items():
        size, section = stage.batch_size // stage.microbatches, "parent.training" if name == "parent" else name
        if stage.batch_size % workers:
            return None
        if size % workers:
            fewer = range(stage.microbatches, 0, -1)
            parts = next(n for n in fewer if stage.batch_size % n == 0 and stage.batch_size // n % workers == 0)
            changes[f"{section}.microbatches"] = parts
    rank = settings.rank
    if rank.batch_size % workers:
        batches, left = divmod(rank.batches * rank.batch_size, workers)
        if left or batches < rank.depth_batches:
            return None
        changes |= {"rank.batch_size": workers, "rank.batches": batches}
    return changes


def override(settings: Params, changes: dict[str, object]) -> Params:
    """`settings` with changed values, by their names in params.yaml."""
    for key, value in changes.items():
        settings = _replace(settings, key.split("."), value)
    return settings


def _replace(section, path: list[str], value):
    key, *rest = path
    return dataclasses.replace(section, **{key: _replace(getattr(section, key), rest, value) if rest else value})
