"""The training stages: `train_short` lets the router choose the family, `train_extended` trains what it chose.

`run_stage` reads its parameters on the machine where the stage was started, and launches `work` on every worker.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from elastic_core.cost.metrics import PARAMETERS, exact_cost, num_parameters, read_metric
from elastic_core.data.loader import PackedSequences, TokenData, check_tokenizer
from elastic_core.export import elastic_checkpoint
from elastic_core.export.elastic_checkpoint import Member
from elastic_core.io import storage
from elastic_core.io.digests import run_key
from elastic_core.model import hf
from elastic_core.model.submodel import Submodel
from elastic_core.search.importance import Ranking
from elastic_core.search.router import Router
from elastic_core.search.selection import check_budgets, path_between
from elastic_core.search.space import ElasticSpace
from elastic_core.training.distributed import model_files
from elastic_core.training.distributed.placement import Ranks
from elastic_core.training.loop import train
from elastic_core.training.run import Run
from elastic_core.training.stage import Routing, Stage
from tasks.parents.targets import resolve
from tasks.progress.display import Recorder, followed
from tasks.runtime.exit_status import errors_as_text
from tasks.runtime.launch import launch, only_one
from tasks.settings import params, remote_checks

DATA, RANK, SHORT = Path("artifacts/data"), Path("artifacts/rank"), Path("artifacts/train_short/model")
LOCAL = Path("checkpoints")  # what only this machine needs: locks, metrics of runs that are under way, digests


@dataclasses.dataclass(frozen=True)
class Job:
    """A stage's run by name: what decides its result is hashed into `key`."""

    name: str
    key: str
    followed: bool = False  # on a terminal, by the process that launched it

    @property
    def directory(self) -> Path:
        """Where the run's metrics and its lock are."""
        return LOCAL / f"{self.name}-{self.key}"

    @property
    def metrics(self) -> Path:
        """The rows of the run so far, one a step."""
        return self.directory / "metrics.jsonl"

    def checkpoints(self, settings: "params.Params") -> str:
        """Where its checkpoints are: outside DVC's outputs, so that a killed stage finds them again."""
        return storage.join(settings.compute.storage, f"{self.name}-{self.key}")


def make_job(settings: "params.Params", name: str, configuration: dict, inputs: list[Path]) -> Job:
    """The job of a stage: keyed by seed, configuration and the contents of its inputs."""
    configuration = {"seed": settings.seed, **configuration}
    return Job(name, run_key(configuration, [DATA, *inputs], LOCAL / "digests.json"))


def short_job(settings: "params.Params") -> Job:
    """Stage 1, after a last check of the budgets: what params.yaml's own check did not know is the layers' order."""
    space = make_space(settings, hf.read_config(RANK / "model"))
    targets = resolve(settings, space.config)
    check_budgets(space, targets)
    configuration = {
        "stage": settings.train_short,
        "routing": settings.routing,
        "budgets": targets,
        "choices": settings.choices,
    }
    if space.metric != PARAMETERS:  # which earlier runs, without a choice, have in no key
        configuration["cost"] = space.metric
    return make_job(settings, "train_short", configuration, [RANK])


def make_space(settings: "params.Params", config) -> ElasticSpace:
    """The family's choices, in the metric of its budgets."""
    ranking = Ranking.load(RANK / "ranking.json")
    return ElasticSpace(config, settings.choices, ranking.depth, metric=settings.metric)


def extended_job(settings: "params.Params") -> Job:
    return make_job(settings, "train_extended", {"stage": settings.train_extended}, [SHORT, RANK])


def train_short(settings: "params.Params", job: Job, ranks: Ranks) -> None:
    """Stage 1: from the sorted parent to a family; the router learns first, then its choice trains sliced."""
    stage, source = settings.train_short, RANK / "model"
    model = model_files.from_pretrained(source, ranks, settings.compute.execution, stage.precision)
    torch.manual_seed(settings.seed)  # the router's initial weights
    space, budgets = make_space(settings, model.config), resolve(settings, model.config)
    router = Router(space, tuple(budgets.values()))
    run = make_run(settings, job, stage, model, budgets, ranks, router=router)
    run_to_end(run, settings, job, out_directory(job.name) / "metrics.jsonl")
    save_family(run, job.name, source, path_between(router, run.indices))


def train_extended(settings: "params.Params", job: Job, ranks: Ranks) -> None:
    """Stage 2: the chosen family on longer sequences, sliced throughout."""
    stage = settings.train_extended
    model = model_files.from_pretrained(SHORT, ranks, settings.compute.execution, stage.precision)
    content = elastic_checkpoint.read(SHORT)
    members = {
        name: Member(entry["target"], Submodel(**entry["submodel"])) for name, entry in content["budgets"].items()
    }
    budgets = {name: member.target for name, member in members.items()}
    metric = read_metric(content["cost"])
    run = make_run(settings, job, stage, model, budgets, ranks, members=members, metric=metric)
    run_to_end(run, settings, job, out_directory(job.name) / "metrics.jsonl")
    save_family(run, job.name, SHORT, [Submodel(**values) for values in content["path"]])


def make_run(settings, job: Job, stage: Stage, model, budgets, ranks: Ranks, **family) -> Run:
    """The run of one stage, with the sorted parent as frozen teacher where the stage wants one.

    `family`: the router, or the members and the metric of their budgets.
    """
    data = TokenData(DATA)
    check_tokenizer(data, RANK / "model", model.config.vocab_size, "the parent")
    seed = settings.seed + (2 if job.name == "train_short" else 3)  # every stage sees its own order of the data
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


def out_directory(name: str) -> Path:
    return Path("artifacts") / name


def save_family(run: Run, name: str, source: Path, path: list[Submodel]) -> None:
    """Write the elastic checkpoint and a summary of the family's sizes."""
    config, target = run.model.config, out_directory(name) / "model"
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
            print(f"{name}: {budget}: {run.metric.text(cost)}, {share}")
    with run.ranks.first_alone() as is_first:
        if is_first:
            elastic_checkpoint.write(target, config, run.members, path, run.metric)
            (out_directory(name) / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def run_to_end(run: Run, settings: "params.Params", job: Job, metrics: Path) -> None:
    """Train to the end of the stage; rank 0 shows progress and writes a row per step to `metrics`.

    Rows are collected beside the run's lock, so that those of a killed run are there when it is resumed.
    """
    recorder = Recorder(job.name, run.stage, job.metrics, settings.tracking, display=not job.followed)
    with contextlib.ExitStack() as stack:
        with run.ranks.first_alone() as is_first:
            if is_first:
                stack.enter_context(recorder)
        for row in stack.enter_context(contextlib.closing(train(run))):
            if is_first:
                recorder.show(row)
        with run.ranks.first_alone():
            if is_first:
                recorder.finish(metrics)


def work(arguments: dict, ranks: Ranks) -> None:
    """What every worker does, by the parameters that its job was keyed by: the file may have changed since then."""
    job = arguments["job"]
    {"train_short": train_short, "train_extended": train_extended}[job.name](arguments["settings"], job, ranks)


def run_stage(function: Callable[[dict, Ranks], None], settings: "params.Params", job: Job, stage: Stage) -> None:
    """Launch a job's work, alone; exits with what is wrong where it cannot be done.

    Workers elsewhere have no terminal: where there is one here, their rows are shown by this process.
    """
    remote_checks.check(settings, "compute")
    job = dataclasses.replace(job, followed=settings.compute.workers > 0 and sys.stderr.isatty())
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_one(job.directory, job.name))
        if job.followed:
            stack.enter_context(followed(job.name, stage, job.metrics))
        launch(function, {"settings": settings, "job": job}, settings.compute, f"{job.name}-{job.key}")


@errors_as_text()
def main(stage: str) -> None:
    """Run one of the two stages; configuration errors end it before any work."""
    settings = params.load()
    make = {"train_short": short_job, "train_extended": extended_job}[stage]
    run_stage(work, settings, make(settings), getattr(settings, stage))
