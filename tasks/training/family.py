"""What the training stages share: make a run, train it to the end, and save the elastic checkpoint."""

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
from tasks.progress.bars import Bars
from tasks.progress.display import Recorder
from tasks.progress.metrics_file import read_rows
from tasks.runs import provenance
from tasks.runs.job import Job
from tasks.runtime.preflight import check_lengths
from tasks.settings.schema import Params
from tasks.training.teacher import cached_teacher, frozen_teacher

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
    """The run of a stage that trains a family.

    - `seed`: every stage has its own, so that it reads the data in another order.
    - `model`: placed on the workers. If the stage needs a frozen teacher, the sorted parent is loaded as the teacher.
    - `family`: `router`, or `members` and `metric` (see `Run`).

    Raises UserError if the data was made with another tokenizer or is too short, and ConfigError, see `Run` and
    `check_lengths`.
    """
    check_lengths(settings, model.config)
    data = TokenData(DATA)
    check_tokenizer(data, RANK / "model", model.config.vocab_size, "the parent")
    sequences = PackedSequences(data, stage.mixture, stage.sequence_length, seed)
    teacher, cache = None, None
    if stage.teacher == "cached":
        cache = cached_teacher(RANK / "model", settings, job, stage, sequences, seed, model.config.vocab_size, ranks)
    elif stage.teacher != "trainable":
        teacher = frozen_teacher(RANK / "model", settings, stage, ranks)
    return Run(
        model,
        stage,
        sequences,
        budgets,
        **family,
        routing=settings.routing if "router" in family else Routing(),
        teacher=teacher,
        teacher_cache=cache,
        seed=seed,
        checkpoints=job.checkpoints(settings),
        ranks=ranks,
        execution=settings.compute.execution,
    )


def run_to_end(run: Run, settings: Params, job: Job, metrics: Path) -> None:
    """Train to the end of the stage. Rank 0 shows progress and writes the file `metrics`, one row per step.

    During training, the rows are in `job.metrics`. DVC does not delete that file, so a resumed run has the rows of the
    killed one. `metrics` is written at the end.
    """
    recorder = Recorder(job.name, run.stage, job.metrics, settings.tracking, display=not job.shown_by_launcher)
    with contextlib.ExitStack() as stack:
        with run.ranks.first_only() as is_first:
            if is_first:
                stack.enter_context(recorder)
                run.progress = Bars(job.name, "pass").show
        for row in stack.enter_context(contextlib.closing(train(run))):
            if is_first:
                recorder.show(row)
        with run.ranks.first_only():
            if is_first:
                recorder.finish(metrics)


def training_record(run: Run, job: Job) -> dict:
    """The record of a training stage that has ended (tasks/runs/provenance.py). Call it on rank 0."""
    seconds = sum(row["seconds"] for row in read_rows(job.metrics))
    device = provenance.describe_device(run.ranks.device, run.ranks.world)
    return provenance.end(job.record, seconds, device, tokens=run.stage.num_tokens(), steps=run.stage.steps)


def save_comparison(run: Run, job: Job) -> None:
    """Write how the family was chosen to `job.out`/candidates.json, and say it in the log. All ranks call it together.

    The file has the content of `run.comparison` (elastic_core/training/candidates.py), with the sizes of every
    candidate. It has null if no candidates were compared.
    """
    found = run.comparison
    with run.ranks.first_only() as is_first:
        if is_first and found is not None:
            candidates = {}
            for budget, rows in found["candidates"].items():
                submodels = [run.router.space.submodel(row["indices"]).to_dict() for row in rows]
                candidates[budget] = [row | {"submodel": s} for row, s in zip(rows, submodels, strict=True)]
                chosen, own = (found[name]["kl"][budget] for name in ("chosen", "router"))
                if chosen is not None and own is not None:  # None: the model computed numbers that are not finite
                    kl = f"KL {chosen:.4g} (the router's own: {own:.4g})"
                    print(f"{job.name}: {budget}: best of {len(rows)} candidates: {kl}")
            found = found | {"candidates": candidates}
        if is_first:
            write_text(job.out / "candidates.json", json.dumps(found, indent=1) + "\n")


def save_family(run: Run, job: Job, source: Path, path: list[Submodel], earlier: list[dict]) -> None:
    """Write the elastic checkpoint to `job.out`, with its provenance, and a summary of the members' sizes.

    - `source`: the directory that training began with, which has the tokenizer.
    - `path`: the submodels between the members.
    - `earlier`: the records of the stages before this one.
    """
    config, target = run.model.config, job.out / "model"
    model_files.save_pretrained(run.model, target, run.ranks, tokenizer_from=source)
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
            elastic_checkpoint.write(target, config, run.members, path, run.metric, run.norms is not None)
            provenance.write(target, [*earlier, training_record(run, job)])
            write_text(job.out / "summary.json", json.dumps(summary, indent=1) + "\n")
