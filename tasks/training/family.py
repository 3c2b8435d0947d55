"""What the stages that train a family share: the run, its rows of metrics, and the elastic checkpoint it leaves."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from elastic_core.cost.metrics import exact_cost, num_parameters
from elastic_core.data.loader import PackedSequences, TokenData, check_tokenizer
from elastic_core.export import elastic_checkpoint
from elastic_core.io.atomic import write_text
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.model.submodel import Submodel
from elastic_core.training.distributed import model_files
from elastic_core.training.distributed.ranks import Ranks
from elastic_core.training.loop import train
from elastic_core.training.run import Run
from elastic_core.training.stage import Routing, Stage
from tasks.progress.display import Recorder
from tasks.settings.schema import Params
from tasks.training.job import Job

DATA, RANK = Path("artifacts/data"), Path("artifacts/rank")


def make_run(
    settings: Params,
    job: Job,
    stage: Stage,
    seed: int,
    model: ElasticModel,
    budgets: dict[str, float],
    ranks: Ranks,
    **family,
) -> Run:
    """The run of a stage that trains a family, with the sorted parent as frozen teacher where the stage wants one.

    `family`: the router, or the members and the metric of their budgets. Every stage has its own `seed`, so that it
    sees its own order of the data.
    """
    data = TokenData(DATA)
    check_tokenizer(data, RANK / "model", model.config.vocab_size, "the parent")
    sequences = PackedSequences(data, stage.mixture, stage.sequence_length, seed)
    teacher = None
    if stage.teacher != "trainable":
        teacher = model_files.from_pretrained(
            RANK / "model", ranks, settings.compute.execution, stage.precision, frozen=True
        )
    return Run(
        model,
        stage,
        sequences,
        budgets,
        **family,
        routing=settings.routing if "router" in family else Routing(),
        teacher=teacher,
        seed=seed,
        checkpoints=job.checkpoints(settings),
        ranks=ranks,
    )


def run_to_end(run: Run, settings: Params, job: Job, metrics: Path) -> None:
    """Train to the end of the stage; rank 0 shows progress and writes a row per step to `metrics`.

    Rows are collected beside the run's lock, so that those of a killed run are there when it is resumed.
    """
    recorder = Recorder(job.name, run.stage, job.metrics, settings.tracking, display=not job.followed)
    with contextlib.ExitStack() as stack:
        with run.ranks.first_only() as is_first:
            if is_first:
                stack.enter_context(recorder)
        for row in stack.enter_context(contextlib.closing(train(run))):
            if is_first:
                recorder.show(row)
        with run.ranks.first_only():
            if is_first:
                recorder.finish(metrics)


def save_family(run: Run, job: Job, tokenizer_from: Path, path: list[Submodel]) -> None:
    """Write the elastic checkpoint and a summary of the family's sizes. `path`: the nested submodels in between."""
    config, target = run.model.config, job.out / "model"
    model_files.save_pretrained(run.model, target, run.ranks, tokenizer_from=tokenizer_from)
    full, summary = run.parent_cost, {}
    for budget, member in run.members.items():
        cost = exact_cost(run.metric, config, member.submodel)
        summary[budget] = {
            "target": member.target,
            "num_parameters": num_parameters(config, member.submodel),
            "deviation": cost / (member.target * full) - 1,
            **member.submodel.to_dict(),
        }
        if run.ranks.rank == 0:
            share = f"{cost / full:.3f} of the parent (target {member.target:.6g})"
            print(f"{job.name}: {budget}: {run.metric.text(cost)}, {share}")
    with run.ranks.first_only() as is_first:
        if is_first:
            elastic_checkpoint.write(target, config, run.members, path, run.metric)
            write_text(job.out / "summary.json", json.dumps(summary, indent=1) + "\n")
