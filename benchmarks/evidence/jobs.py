"""Jobs: what one process does, its settings and its digest. An arm and a seed give one job, or one per separate member.

A job of kind ``rank`` makes the sorted parent for all arms with the same ranking. A job of kind ``train`` trains and
measures a family, or one member alone. The digest of a job names its files. It is made of everything that decides the
result, but not of the arm's name: two arms with equal settings share their jobs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.evidence.arms import FIXED, ROUTED, Arm, values_of
from elastic_core.config import ConfigError
from elastic_core.cost.metrics import num_parameters
from elastic_core.errors import UserError, named
from elastic_core.export import elastic_checkpoint
from elastic_core.io.fingerprints import file_digest
from elastic_core.io.json_files import read_json
from elastic_core.model import hf
from elastic_core.model.submodel import Submodel
from elastic_core.search.selection import Member
from elastic_core.training.stage import Stage
from tasks.parents.targets import resolve
from tasks.runtime.preflight import check_architecture
from tasks.settings.load import read
from tasks.settings.schema import Params

FORMAT = 1  # of jobs and results; a part of every digest
SEED_STEP = 10  # stages add small numbers to the seed, so neighbouring seeds would share their order of the data
RANK, TRAIN = "rank", "train"


@dataclass(frozen=True)
class Job:
    """What one process does, in JSON values.

    - `values`: the content of params.yaml for this job, before `settings_of` applies the other fields.
    - `seed`: 0 is the profile's own seed. `tokens`: the share of the profile's training tokens.
    - `members`: budget → target and sizes of the fixed members; None for a router.
    - `only`: the member that is trained alone; None for a family.
    - `rank`: the digest of the job with the sorted parent. `source`: the digest of the job whose members' uniform
      counterparts are trained, or None. Both have to be done before.
    """

    kind: str
    digest: str
    arm: str
    values: dict
    artifacts: str
    seed: int = 0
    tokens: float = 1.0
    stages: tuple[str, ...] = ()
    members: dict | None = None
    only: str | None = None
    rank: str | None = None
    source: str | None = None
    tasks: bool = False
    work: float = 0.0

    @property
    def after(self) -> list[str]:
        """The digests of the jobs whose results this one needs."""
        return [digest for digest in (self.rank, self.source) if digest is not None]

    @property
    def title(self) -> str:
        alone = "" if self.only is None else f", {self.only} alone"
        return f"ranking of {self.arm}" if self.kind == RANK else f"{self.arm}{alone}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """What all jobs of a call share: the profile, the directory with its artifacts, and how much is done.

    `members`: the fixed members by budget; None if no arm needs them.
    """

    profile: str
    artifacts: Path
    members: dict[str, Member] | None
    seeds: int
    router_seeds: int
    steps_scale: float = 1.0
    tasks: bool = False


def settings_of(job: Job) -> Params:
    """The checked parameters of a job, with its seed, its stages and its tokens. Raises ConfigError.

    A member alone has all of the training, and the parent as its teacher. A stage alone gets the steps that read the
    tokens of both, and ends with the learning rate of the last stage.
    """
    params = read(job.values, f"arm {job.arm}: params.yaml")
    params = dataclasses.replace(params, seed=params.seed + SEED_STEP * job.seed)
    if not job.tasks:
        params = dataclasses.replace(params, evaluate=dataclasses.replace(params.evaluate, tasks=()))
    total = params.train_short.num_tokens() + params.train_extended.num_tokens()
    last = params.train_extended.learning_rate * params.train_extended.final_learning_rate
    stages = {name: scaled(getattr(params, name), job.tokens) for name in job.stages}
    if len(stages) == 1:
        ((name, stage),) = stages.items()
        stage = scaled(stage, total / getattr(params, name).num_tokens())
        stages[name] = dataclasses.replace(stage, final_learning_rate=min(1.0, last / stage.learning_rate))
    if job.only is not None:
        params = dataclasses.replace(params, budgets={job.only: params.budgets[job.only]})
        stages = {name: alone(stage, job.only) for name, stage in stages.items()}
    return dataclasses.replace(params, **stages)


def scaled(stage: Stage, share: float) -> Stage:
    """The stage with this share of its steps and of its warm-up."""
    return dataclasses.replace(
        stage, steps=max(1, round(stage.steps * share)), warmup_steps=round(stage.warmup_steps * share)
    )


def alone(stage: Stage, budget: str) -> Stage:
    """The stage for one budget alone, which learns from the parent."""
    losses = {name: loss for name, loss in stage.loss_by_budget.items() if name == budget}
    return dataclasses.replace(stage, budget_shares={}, loss_by_budget=losses, teacher="frozen")


def read_members(path: Path, directory: Path) -> dict[str, Member]:
    """The members in an ``elastic.json``, checked against the parent in `directory`. Raises UserError."""
    if not path.is_file():
        raise UserError(
            f"{path}: does not exist; arms with fixed members take their sizes from it: run the profile to its end "
            "(elastic run), or name another elastic.json with --members, or choose arms with `members: routed`"
        )
    content, config = read_json(path, shape=elastic_checkpoint.SHAPE), hf.read_config(directory)
    with named(path):
        return {
            name: Member(entry["target"], Submodel(**entry["submodel"]).resolve(config))
            for name, entry in content["budgets"].items()
        }


def jobs_of(plan: Plan, arms: Iterable[Arm]) -> tuple[list[Job], dict[tuple[str, str], list[Job]]]:
    """(ranking jobs, training jobs by arm and member alone, one per seed). The member is "" for families.

    Raises ConfigError for parameters that are wrong or do not exist, before anything is trained.
    """
    inputs, rankings, groups = input_digests(plan.artifacts), {}, {}
    for arm in arms:
        values = values_of(plan.profile, arm)
        rank = ranking_job(plan, arm, values, inputs)
        rankings.setdefault(rank.digest, rank)
        check_members(plan, arm, values)
        template = Job(TRAIN, "", arm.name, values, str(plan.artifacts), 0, share_of_tokens(plan, arm), arm.stages,
                       rank=rank.digest, tasks=plan.tasks)  # fmt: skip
        seeds = range(plan.router_seeds if arm.members == ROUTED else plan.seeds)
        sources = None if arm.members in (FIXED, ROUTED) else groups[arm.members, ""]
        for only in smaller_members(plan) if arm.separate else [None]:
            members = fixed_members(plan, only) if arm.members == FIXED else None
            job = dataclasses.replace(template, members=members, only=only)
            groups[arm.name, only or ""] = [
                with_digest(dataclasses.replace(job, seed=seed, source=sources and sources[seed].digest), inputs)
                for seed in seeds
            ]
    return list(rankings.values()), groups


def smaller_members(plan: Plan) -> list[str]:
    """The members below the parent's cost."""
    return [name for name, member in plan.members.items() if member.target < 1]


def share_of_tokens(plan: Plan, arm: Arm) -> float:
    """The share of the profile's training tokens that a job of the arm reads."""
    return plan.steps_scale * (1 / len(smaller_members(plan)) if arm.tokens == "equal" else arm.tokens)


def check_members(plan: Plan, arm: Arm, values: dict) -> None:
    """Raise ConfigError if an arm with fixed members has other budgets, or one with a router impossible choices."""
    if arm.separate and not smaller_members(plan):
        raise ConfigError(f"arm {arm.name}: separate: got true; allowed: false, no member is below the parent's cost")
    if arm.members == ROUTED:
        with named(f"arm {arm.name}: params.yaml"):
            check_architecture(read(values, "params.yaml"), hf.read_config(plan.artifacts / "parent"))
    if arm.members == FIXED and set(plan.members) != set(values["budgets"]):
        names = ", ".join(plan.members)
        raise ConfigError(
            f"arm {arm.name}: budgets: got {', '.join(values['budgets'])}; allowed: those of the members, {names}; "
            "give other members with --members, or choose `members: routed`"
        )


def fixed_members(plan: Plan, only: str | None) -> dict:
    return {
        name: {"target": member.target, "submodel": member.submodel.to_dict()}
        for name, member in plan.members.items()
        if only in (None, name)
    }


def ranking_job(plan: Plan, arm: Arm, values: dict, inputs: dict) -> Job:
    """The job with the sorted parent of an arm. It has the profile's own seed, so all seeds share it."""
    job = Job(RANK, "", arm.name, values, str(plan.artifacts))
    settings = settings_of(job)
    depth = min(settings.choices.depth or (0,))
    content = [FORMAT, RANK, inputs, settings.seed, asdict(settings.rank), depth, asdict(settings.evaluate)]
    return dataclasses.replace(job, digest=digest_of(content))


def with_digest(job: Job, inputs: dict) -> Job:
    """The training job with its digest and its amount of work."""
    settings = settings_of(job)
    content = [
        *(FORMAT, TRAIN, inputs, job.rank, job.source, job.members, job.only),
        *(settings.seed, settings.budgets, job.values.get("cost")),
        {name: asdict(getattr(settings, name)) for name in job.stages},
        asdict(settings.evaluate),
        None if job.members or job.source else [asdict(settings.choices), asdict(settings.routing)],
    ]
    return dataclasses.replace(job, digest=digest_of(content), work=amount_of_work(settings, job))


def amount_of_work(settings: Params, job: Job) -> float:
    """Parameters times tokens of a job's training: three passes of the student and one of the teacher, over four."""
    config, work = hf.read_config(Path(job.artifacts) / "parent"), 0.0
    costs = resolve(settings, config)
    for name in job.stages:
        stage = getattr(settings, name)
        shares = stage.budget_shares or dict.fromkeys(costs, 1.0)
        mean = sum(shares[budget] * costs[budget] for budget in shares) / sum(shares.values())
        work += stage.num_tokens() * (3 * mean + 1) / 4
    return work * num_parameters(config)


def input_digests(artifacts: Path) -> dict[str, str]:
    """Digests of the data and of the parent. Raises UserError if they are not there."""
    found = {}
    for name, files in {"data": ("manifest.json",), "parent": ("config.json", "*.safetensors")}.items():
        paths = sorted(path for pattern in files for path in (artifacts / name).glob(pattern))
        if not paths:
            raise UserError(
                f"{artifacts / name}: not there; make it with `elastic run PROFILE --until parent`, or name the "
                "directory with data and parent with --artifacts"
            )
        found[name] = hashlib.sha256("".join(map(file_digest, paths)).encode()).hexdigest()
    return found


def digest_of(content) -> str:
    """16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
