"""The parent as the teacher of a stage: a frozen model, or its largest logits on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from elastic_core.data.loader import PackedSequences
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.training.distributed import model_files
from elastic_core.training.distributed.ranks import Ranks
from elastic_core.training.run import precision
from elastic_core.training.stage import Stage
from elastic_core.training.teacher_cache import TeacherCache
from tasks.progress.bars import Bars
from tasks.runs.job import Job
from tasks.settings.schema import Params

# What the teacher's logits depend on, besides the settings of the stage and libraries: the data decides the text of a
# row together with the code that packs it. Paths are dependencies of the stage in dvc.yaml.
READ = ("artifacts/data", "artifacts/rank", "elastic_core/data", "elastic_core/model")
FORMAT = 1  # of the files


def frozen_teacher(parent: Path, settings: Params, stage: Stage, ranks: Ranks) -> ElasticModel:
    """The sorted parent in the directory `parent`, placed on the workers."""
    return model_files.from_pretrained(parent, ranks, settings.compute.execution, stage.precision, frozen=True)


def cached_teacher(
    parent: Path,
    settings: Params,
    job: Job,
    stage: Stage,
    data: PackedSequences,
    seed: int,
    vocab_size: int,
    ranks: Ranks,
) -> TeacherCache:
    """The parent's largest logits for every row that the stage reads. Those that are not on disk yet are computed.

    They are in `compute.storage`, under a name that depends on everything that decides them, so that other runs of the
    stage, with another learning rate for instance, use them too. Raises ConfigError if `kept_logits` is not below the
    size of the vocabulary.
    """
    name = ranks.from_first(lambda: f"teacher-{_key(job, stage, seed)}")
    cache = TeacherCache(Path(settings.compute.storage) / name, data, stage, vocab_size)
    show = Bars(job.name, "file").show if ranks.rank == 0 else None
    cache.make(
        lambda: frozen_teacher(parent, settings, stage, ranks),
        ranks,
        precision(stage, ranks.device),
        None if show is None else lambda done, total: show("logits of the teacher", done, total),
    )
    return cache


def _key(job: Job, stage: Stage, seed: int) -> str:
    fields = ("sequence_length", "batch_size", "steps", "mixture", "precision", "kept_logits")
    values = {name: getattr(stage, name) for name in fields} | {"temperature": stage.loss.temperature, "seed": seed}
    files = {path: job.record["files"][path] for path in READ}
    content = json.dumps([FORMAT, values, files, job.record["libraries"]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
