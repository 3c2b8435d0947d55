"""Estimates what a training stage takes, for `elastic plan`: memory of a worker, FLOPs, hours."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import torch

from elastic_core.config import require
from elastic_core.cost.budgets import parse
from elastic_core.errors import UserError
from elastic_core.model.submodel import Submodel, full_submodel
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.estimate.flops import attention_pairs, pass_flops
from elastic_core.training.estimate.live_bytes import TrainingSetting
from elastic_core.training.estimate.piece_memory import Pieces
from elastic_core.training.estimate.rank_memory import RankWorkload, rank_peak
from elastic_core.training.estimate.step_memory import Peak, Workload, host_bytes, step_peak
from elastic_core.training.stage import Stage
from elastic_core.training.teacher_cache import bytes_per_token
from tasks.settings.schema import Params
from tasks.settings.sections import Compute

RESERVE = 0.1  # share of a GPU's memory that the allocator, libraries and CUDA need
PEAKS = {"bfloat16": 989e12, "float32": 67e12}  # dense FLOP/s of one H100 SXM, from its data sheet


@dataclass(frozen=True)
class Hardware:
    """The hardware of a plan. Raises ConfigError for impossible numbers.

    With `peak` None, stages on GPUs use PEAKS at their precision, and stages on CPUs get no hours.
    """

    memory: float = 80e9  # bytes of a GPU
    utilisation: float = 0.4  # share of the peak that training reaches
    peak: float | None = None  # FLOP/s
    price: float | None = None  # of one GPU for one hour, in any currency

    def __post_init__(self):
        require(self.memory > 0, "gpu-memory", self.memory, "above 0")
        require(0 < self.utilisation <= 1, "utilisation", self.utilisation, "above 0, up to 1")
        require(self.peak is None or self.peak > 0, "peak", self.peak, "above 0")
        require(self.price is None or self.price >= 0, "price", self.price, "0 or more")

    @classmethod
    def read(cls, memory: str, utilisation: float, teraflops: float | None, price: float | None = None) -> Hardware:
        """Parse `memory` such as '80GB', '141 GB' or '80GiB'. `teraflops` is the peak in TFLOP/s.

        Raises UserError for another spelling.
        """
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB)\s*", memory)
        if found is None:
            raise UserError(f"gpu-memory: got {memory!r}; allowed: a size such as 80GB or 80GiB")
        unit = {"GB": 1e9, "GiB": 2.0**30}[found[2]]
        return cls(float(found[1]) * unit, utilisation, None if teraflops is None else 1e12 * teraflops, price)

    @property
    def usable(self) -> float:
        """Bytes of a GPU that training can use."""
        return (1 - RESERVE) * self.memory


def describe_stage(
    name: str,
    settings: Params,
    config,
    members: dict[str, Submodel],
    hardware: Hardware,
    document_length: float | None,
) -> dict:
    """The plan of one stage as plain values. Bytes are per worker.

    members: budget → submodel. For document_length see `describe_work`.
    """
    peak = stage_peak(name, settings, config)
    return {
        **describe_workload(name, settings),
        "memory": peak.kinds,
        "total": peak.total,
        "total_with_kernels": total_with_kernels(name, settings, config),
        "host_memory": host_bytes(Pieces.of(config, training_setting(name, settings)), make_workload(name, settings)),
        "cache": cache_bytes(name, settings, config),
        "moment": peak.moment,
        "fits": peak.total <= hardware.usable,
        **describe_work(name, settings, config, members, hardware, document_length),
    }


def stages_of(settings: Params) -> dict[str, Stage]:
    """Name → section of the training stages, in order."""
    own = {} if settings.parent.training is None else {"parent": settings.parent.training}
    return {**own, "train_short": settings.train_short, "train_extended": settings.train_extended}


def learns_softly(name: str, settings: Params) -> bool:
    """Whether a stage starts with the router's soft masks. It then computes at full size for a while."""
    return name == "train_short" and settings.routing.mode == "soft"


def use_gpus(compute: Compute) -> bool:
    """Whether workers have GPUs."""
    return compute.gpus_per_worker > 0


def describe_workload(name: str, settings: Params) -> dict:
    """What one worker computes in a microbatch, and how."""
    stage, load = stages_of(settings)[name], make_workload(name, settings)
    return {
        "workers": max(1, settings.compute.workers),
        "shards": load.shards,
        "sharing": load.sharing,
        "sequences": load.sequences,
        "sequence_length": load.length,
        "microbatches": stage.microbatches,
        "precision": stage.precision,
        "activation_checkpointing": settings.compute.execution.activation_checkpointing,
    }


def make_workload(name: str, settings: Params) -> Workload:
    """What one worker computes in a microbatch of a stage."""
    stage, workers = stages_of(settings)[name], max(1, settings.compute.workers)
    shards = settings.compute.execution.shard_over or workers
    sharing = settings.compute.execution.context_parallel
    sequences = stage.batch_size // stage.microbatches // (workers // sharing)
    has_teacher = name != "parent" and stage.teacher in ("frozen", "mixed")
    shares = {} if name == "parent" else stage.budget_shares or dict.fromkeys(settings.budgets, 1.0)
    matches_states = any(
        share > 0 and stage.loss_of(budget).state_weight > 0 and taught_share(name, stage, settings, budget) > 0
        for budget, share in shares.items()
    )
    has_norms = name != "parent" and settings.rank.private_norms
    return Workload(
        sequences,
        stage.sequence_length // sharing,
        shards,
        stage.microbatches > 1,
        has_teacher,
        matches_states,
        sum(not parse(budget).is_full for budget in settings.budgets.values()) if has_norms else 0,
        stage.kept_logits if name != "parent" and stage.teacher == "cached" else 0,
        sharing,
        stage.optimizer == "adamw8bit",
    )


def cache_bytes(name: str, settings: Params, config) -> float:
    """The bytes on disk of the teacher's largest logits: at most, as if no row of the data was read twice."""
    stage, load = stages_of(settings)[name], make_workload(name, settings)
    return float(stage.num_tokens() * bytes_per_token(load.kept_logits, config.vocab_size)) if load.kept_logits else 0.0


def training_setting(name: str, settings: Params) -> TrainingSetting:
    """How a worker trains in a stage."""
    compute = settings.compute
    precision = stages_of(settings)[name].precision
    return TrainingSetting(precision, compute.execution, compute.workers > 0, use_gpus(compute))


def stage_peak(name: str, settings: Params, config) -> Peak:
    """The largest memory of a worker in a stage, in bytes.

    While the router learns, layers have gates and no states are matched; after that, it is the other way round.
    """
    setting = training_setting(name, settings)
    load, learns = make_workload(name, settings), learns_softly(name, settings)
    phases = {True: dataclasses.replace(load, matches_states=False)} if learns else {False: load}
    if load.matches_states:
        phases[False] = load
    peaks = (step_peak(Pieces.of(config, setting, gates), load) for gates, load in phases.items())
    return max(peaks, key=lambda peak: peak.total)


def total_with_kernels(name: str, settings: Params, config) -> float | None:
    """The largest memory where `mamba_ssm` and `causal_conv1d` are installed; None if they change nothing."""
    pieces = Pieces.of(config, training_setting(name, settings))
    if learns_softly(name, settings) or not pieces.has_kernels:  # with gates, layers are computed in parts
        return None
    return step_peak(pieces.with_kernels(), make_workload(name, settings)).total


def describe_work(
    name: str,
    settings: Params,
    config,
    members: dict[str, Submodel],
    hardware: Hardware,
    document_length: float | None,
) -> dict:
    """Tokens, FLOPs by kind, and hours of a stage.

    document_length: the mean length of the documents in a row, in positions, over positions; None: a row is one
    document. FLOPs include recomputation, because `utilisation` refers to all FLOPs that the hardware computes.
    """
    stage, compute = stages_of(settings)[name], settings.compute
    flops = dict.fromkeys(("student", "recomputed", "teacher"), 0.0)
    length, on_gpu = stage.sequence_length, use_gpus(compute)
    shares = {"parent": 1.0} if name == "parent" else stage.budget_shares or dict.fromkeys(settings.budgets, 1.0)
    soft_share = settings.routing.share if learns_softly(name, settings) else 0.0
    pairs = float(length**2)
    if document_length is not None:
        pairs = attention_pairs(length, document_length, getattr(torch, stage.precision), on_gpu)
    teacher_pass = pass_flops(config, length, on_gpu=on_gpu, pairs=pairs)
    for budget, share in shares.items():
        sequences = share / sum(shares.values()) * stage.steps * stage.batch_size
        for submodel, part in (
            (full_submodel(config), soft_share),
            (members.get(budget, full_submodel(config)), 1 - soft_share),
        ):
            student_pass = pass_flops(config, length, submodel, on_gpu, pairs)
            flops["student"] += sequences * part * (student_pass.forward + student_pass.backward)
            if compute.execution.activation_checkpointing:  # of everything except the head
                head = 2 * length * config.vocab_size * submodel.hidden_size
                flops["recomputed"] += sequences * part * (student_pass.forward - head)
        flops["teacher"] += sequences * taught_share(name, stage, settings, budget) * teacher_pass.forward
    total, peak = sum(flops.values()), hardware.peak
    if peak is None and on_gpu:
        peak = PEAKS[stage.precision]
    hours = None if peak is None else total / (peak * hardware.utilisation) / 3600
    return {
        "document_length": document_length,
        "attention_pairs": pairs,
        "tokens": stage.num_tokens(),
        "steps": stage.steps,
        "flops": flops,
        "peak": peak,
        "gpu_hours": hours,
        "hours": None if hours is None else hours / max(1, compute.workers),
        "cost": None if hours is None or hardware.price is None else hours * hardware.price,
    }


def taught_share(name: str, stage: Stage, settings: Params, budget: str) -> float:
    """The share of a budget's microbatches in which a teacher runs.

    A trainable teacher is the full budget itself, so the full budget's microbatches run no teacher. States alone are
    not matched before the router's choice has settled.
    """
    loss = stage.loss_of(budget)
    if name == "parent" or loss.kl_weight == loss.state_weight == 0:
        return 0.0
    share = 1.0 - settings.routing.share if loss.kl_weight == 0 and name == "train_short" else 1.0
    trainable_share = {"mixed": 0.5, "trainable": 1.0}.get(stage.teacher, 0.0)
    return share * (1.0 - trainable_share) if parse(settings.budgets[budget]).is_full else share


def describe_rank(settings: Params, config, hardware: Hardware) -> dict:
    """The plan of stage rank: bytes of a worker by kind, at the moment at which it holds most."""
    load, setting = make_rank_workload(settings, config)
    peak = rank_peak(config, setting, load)
    return {
        "workers": max(1, settings.compute.workers),
        "sequences": load.sequences,
        "sequence_length": load.length,
        "precision": setting.precision,
        "memory": peak.kinds,
        "total": peak.total,
        "moment": peak.moment,
        "fits": peak.total <= hardware.usable,
    }


def make_rank_workload(settings: Params, config) -> tuple[RankWorkload, TrainingSetting]:
    """What one worker computes in stage rank, and how.

    A sharded parent that computes in float32 is held in the 16-bit type of its files. That is the type in the parent's
    config.json. A parent that is trained here has float32 files.
    """
    section, compute = settings.rank, settings.compute
    workers, held = max(1, compute.workers), getattr(torch, section.precision)
    stored = getattr(config, "dtype", None)
    if compute.workers and isinstance(stored, torch.dtype) and stored.itemsize == 2:
        held = stored if section.precision == "float32" else held
    load = RankWorkload(
        section.batch_size // workers,
        section.sequence_length,
        section.batches,
        section.depth_batches,
        held,
        compute.execution.shard_over or workers,
        section.measure,
        section.aggregation,
        section.depth_method,
        section.basis == "principal",
        section.private_norms,
    )
    return load, TrainingSetting(section.precision, Execution(), compute.workers > 0, use_gpus(compute))
