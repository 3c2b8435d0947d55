"""Stage `rank`: score the parent's units and layers on calibration data, and sort its weights by importance."""

import time
from pathlib import Path

from elastic_core import ElasticModel, rank
from elastic_core.data.loader import PackedSequences, TokenData
from elastic_core.io import storage
from elastic_core.model import hf
from elastic_core.search.importance.sorting import sort_directory
from elastic_core.search.importance.state import RankingState
from elastic_core.training.distributed import model_files
from elastic_core.training.distributed.execution import Execution
from elastic_core.training.distributed.placement import autocast, gather_root, reshard
from elastic_core.training.distributed.ranks import Ranks
from tasks.progress.bars import progress_bar
from tasks.runs import provenance
from tasks.runs.job import started
from tasks.runtime.launch import launch
from tasks.runtime.preflight import check_lengths
from tasks.settings import remote_checks
from tasks.settings.load import load

PARENT, DATA, OUT = Path("artifacts/parent"), Path("artifacts/data"), Path("artifacts/rank")
PLAIN = Execution()
SAVE_SECONDS = 20.0  # between two saves of the sums; those of a large model take seconds to write


def main() -> None:
    settings = load()
    check_lengths(settings, hf.read_config(PARENT))
    remote_checks.check(settings, "compute")
    with started("rank", settings) as job:
        launch(work, {"settings": settings, "job": job}, settings.compute, f"rank-{job.key}")


def work(arguments: dict, ranks: Ranks) -> None:
    """The stage's work on one worker.

    The workers share the parent's weights (FSDP2), and each scores its own sequences of every batch. The scores are
    summed over workers, so all of them get the same ranking. The first worker sorts the parent, tensor by tensor.
    """
    settings, job, begin = arguments["settings"], arguments["job"], time.monotonic()
    section, location = settings.rank, job.checkpoints(settings)
    model = load_parent(PARENT, ranks, section.precision, settings.compute.execution)
    sequences = PackedSequences(TokenData(DATA), section.mixture, section.sequence_length, settings.seed + 1)
    part = ranks.part(section.batch_size, "rank.batch_size")
    size = part.stop - part.start
    batches = [sequences.batch(i * section.batch_size + part.start, size) for i in range(section.batches)]
    bars = {}

    def progress(what: str, done: int, total: int) -> None:
        if ranks.rank == 0:
            if what not in bars:
                bars[what] = progress_bar(f"rank {what}", total, "step")
            bars[what].update(done - bars[what].n)

    with autocast(section.precision, ranks.device):
        ranking = rank(
            model,
            [batch.to(ranks.device) for batch in batches],
            basis=section.basis,
            private_norms=section.private_norms,
            measure=section.measure,
            aggregation=section.aggregation,
            depth_method=section.depth_method,
            depth_batches=section.depth_batches,
            min_depth=min(settings.choices.depth or (len(model.model.layers),)),
            progress=progress,
            reduce=ranks.sum,
            state=make_state(location, ranks, SAVE_SECONDS),
        )
    for bar in bars.values():
        bar.close()
    reshard(model)  # sorting needs memory for a few tensors only
    del model
    with ranks.first_only() as is_first:
        if is_first:
            ranking.save(OUT / "ranking.json")
            sort_directory(PARENT, OUT / "model", ranking, ranks.device)
            device = provenance.describe_device(ranks.device, ranks.world)
            provenance.write_record(provenance.end(job.record, time.monotonic() - begin, device))
            print(f"layers, most important first: {' '.join(map(str, ranking.depth))}")


def load_parent(directory: Path, ranks: Ranks, precision: str, execution: Execution = PLAIN) -> ElasticModel:
    """The parent for forward passes only. Workers of one process group share its weights (see `Execution.shard_over`).

    Its matrices are held in bfloat16 if `precision` or its files have that type. Of `execution`, what concerns training
    is not used.
    """
    execution = Execution(shard_over=execution.shard_over, deterministic=execution.deterministic)
    model = model_files.from_pretrained(directory, ranks, execution, precision, frozen=True, as_stored=True)
    gather_root(model)
    return model


def make_state(location: str, ranks: Ranks, seconds: float = 0.0) -> RankingState:
    """What an earlier run of the stage had finished, in files of the directory or URL `location`.

    `seconds`: see `RankingState`.
    """

    def load(name: str) -> bytes | None:
        path = storage.join(location, name)
        return ranks.from_first(lambda: storage.read_bytes(path) if storage.exists(path) else None)

    def save(name: str, data: bytes) -> None:
        if ranks.rank == 0:
            storage.write_bytes(storage.join(location, name), data)

    return RankingState(load, save, ranks.rank == 0, seconds)
