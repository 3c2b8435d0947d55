"""The training stages: `train_short` lets the router choose the family, `train_extended` trains what it chose."""

import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from elastic_core import ElasticModel, checkpoint, elastic_checkpoint
from elastic_core.choices import ElasticSpace
from elastic_core.cost import num_parameters
from elastic_core.curriculum import Routing, Stage
from elastic_core.data import PackedSequences, TokenData, check_tokenizer
from elastic_core.elastic_checkpoint import Member
from elastic_core.importance import Ranking
from elastic_core.router import Router
from elastic_core.selection import path_between
from elastic_core.submodel import Submodel
from elastic_core.training import Run, train
from tasks import params

DATA, RANK, CHECKPOINTS = Path("artifacts/data"), Path("artifacts/rank"), Path("checkpoints")
LOG_SECONDS = 5.0  # between lines where there is no terminal for a progress bar


def checkpoint_directory(stage: str, configuration: dict, seed: int, inputs: list[Path]) -> Path:
    """Where a stage's checkpoints live: outside DVC's outputs, keyed by configuration and inputs."""
    return CHECKPOINTS / f"{stage}-{checkpoint.run_key({'seed': seed, **configuration}, inputs)}"


def train_short(settings: "params.Params") -> None:
    """Stage 1: from the sorted parent to a family; the router learns first, then its choice trains sliced."""
    stage, source = settings.train_short, RANK / "model"
    model = ElasticModel.from_pretrained(source)
    budgets = dict(sorted(settings.budgets.items(), key=lambda item: -item[1]))
    torch.manual_seed(settings.seed)  # the router's initial weights
    space = ElasticSpace(model.config, settings.choices, Ranking.load(RANK / "ranking.json").depth)
    router = Router(space, tuple(budgets.values()))
    configuration = {"stage": stage, "routing": settings.routing, "budgets": budgets, "choices": settings.choices}
    run = make_run(settings, "train_short", stage, model, budgets, configuration, [RANK], router=router)
    run_to_end(run, "train_short", out_directory("train_short") / "metrics.jsonl")
    save_family(run, "train_short", source, path_between(router, run.indices))


def train_extended(settings: "params.Params") -> None:
    """Stage 2: the chosen family on longer sequences, sliced throughout."""
    stage, source = settings.train_extended, Path("artifacts/train_short/model")
    model = ElasticModel.from_pretrained(source)
    content = elastic_checkpoint.read(source)
    members = {
        name: Member(entry["target"], Submodel(**entry["submodel"])) for name, entry in content["budgets"].items()
    }
    budgets = {name: member.target for name, member in members.items()}
    run = make_run(settings, "train_extended", stage, model, budgets, {"stage": stage}, [source, RANK], members=members)
    run_to_end(run, "train_extended", out_directory("train_extended") / "metrics.jsonl")
    save_family(run, "train_extended", source, [Submodel(**values) for values in content["path"]])


def make_run(
    settings, name: str, stage: Stage, model, budgets, configuration, inputs, members=None, router=None
) -> Run:
    """The run of one stage, with the sorted parent as frozen teacher where the stage wants one."""
    data = TokenData(DATA)
    check_tokenizer(data, RANK / "model", model.config.vocab_size, "the parent")
    teacher = None if stage.teacher == "trainable" else ElasticModel.from_pretrained(RANK / "model")
    seed = settings.seed + (2 if name == "train_short" else 3)  # every stage sees its own order of the data
    return Run(
        model,
        stage,
        PackedSequences(data, stage.mixture, stage.sequence_length, seed),
        budgets,
        members=members,
        router=router,
        routing=settings.routing if router else Routing(),
        teacher=teacher,
        seed=seed,
        checkpoints=checkpoint_directory(name, configuration, seed, [DATA, *inputs]),
    )


def out_directory(name: str) -> Path:
    return Path("artifacts") / name


def save_family(run: Run, name: str, source: Path, path: list[Submodel]) -> None:
    """Write the elastic checkpoint and a summary of the family's sizes."""
    config, target = run.model.config, out_directory(name) / "model"
    run.model.save_pretrained(target, tokenizer_from=source)
    elastic_checkpoint.write(target, config, run.members, path)
    full = num_parameters(config)
    summary = {}
    for budget, member in run.members.items():
        count = num_parameters(config, member.submodel)
        summary[budget] = {
            "target": member.target,
            "num_parameters": count,
            "deviation": count / (member.target * full) - 1,
            **member.submodel.to_dict(),
        }
        print(f"{name}: {budget}: {count:,} parameters, {count / full:.3f} of the parent (target {member.target})")
    (out_directory(name) / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def run_to_end(run: Run, name: str, metrics: Path) -> None:
    """Train to the end of the stage with progress on the terminal (or as lines) and a row per step in `metrics`.

    Rows are collected beside the checkpoints, so that those of a killed run are there when it is resumed.
    """
    rows_file = Path(run.checkpoints) / "metrics.jsonl"
    rows_file.parent.mkdir(parents=True, exist_ok=True)
    if rows_file.exists():  # a kill may have cut the last line short
        rows_file.write_bytes(b"".join(line for line in rows_file.open("rb") if line.endswith(b"\n")))
    progress = Progress(run, name)
    with open(rows_file, "a", buffering=1) as file:
        for row in train(run):
            file.write(json.dumps(row) + "\n")
            progress.show(row)
    progress.close()
    metrics.parent.mkdir(parents=True, exist_ok=True)
    latest = {row["step"]: row for row in map(json.loads, rows_file.read_text().splitlines())}  # a resumed step wins
    lines = [json.dumps(latest[step]) for step in sorted(latest)]
    partial = metrics.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in lines))
    os.replace(partial, metrics)


class Progress:
    """A progress bar on a terminal, a line every few seconds elsewhere: rate, time left, mean loss per budget."""

    def __init__(self, run: Run, name: str):
        self.run, self.name, self.stage = run, name, run.stage
        self.losses: dict[str, float] = {}
        self.bar = None
        self.start, self.first_step, self.last_line = time.monotonic(), None, 0.0

    def show(self, row: dict) -> None:
        if self.first_step is None:
            self.first_step = row["step"] - 1
            self.bar = tqdm(
                total=self.stage.num_tokens(),
                initial=self.stage.num_tokens(self.first_step),
                desc=self.name,
                unit=" tokens",
                unit_scale=True,
                disable=not sys.stderr.isatty(),
            )
        by_budget = defaultdict(list)
        for result in row["microbatches"]:
            by_budget[result["budget"]].append(result["loss"])
        for budget, values in by_budget.items():
            mean = sum(values) / len(values)
            self.losses[budget] = 0.9 * self.losses.get(budget, mean) + 0.1 * mean
        text = " ".join(f"{budget} {loss:.3f}" for budget, loss in self.losses.items())
        self.bar.set_postfix_str(f"{row['mode']} {text}", refresh=False)
        self.bar.update(row["tokens"] - self.bar.n if not self.bar.disable else 0)
        now = time.monotonic()
        if self.bar.disable and (now - self.last_line > LOG_SECONDS or row["step"] == self.stage.steps):
            self.last_line = now
            rate = (row["step"] - self.first_step) / (now - self.start)
            left = (self.stage.steps - row["step"]) / rate
            tokens_per_second = rate * self.stage.num_tokens(1)
            print(
                f"{self.name}: step {row['step']}/{self.stage.steps}, {tokens_per_second:,.0f} tokens/s, "
                f"{left:.0f} s left, {row['mode']}, loss {text}",
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def main(stage: str) -> None:
    """Run one of the two stages; configuration errors end it before any work."""
    settings = params.load()
    {"train_short": train_short, "train_extended": train_extended}[stage](settings)
