"""Does the plan's memory hold? `python -m benchmarks.memory [PROFILE] [--set KEY=VALUE]` trains and compares.

Predicted is what `elastic plan` says of stage 1 (while the router learns) and stage 2; measured is what torch's
allocator holds at most, exactly, during real steps on the CPU, of the profile's parent with random weights and tokens
(the one in params.yaml takes ten seconds on one core), with two documents in every row. Prints predicted, measured, and
their ratio. With `--set compute.workers=1` the process is the only rank of a sharded group.
"""

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator

import torch
import torch.distributed as dist

from benchmarks.comparison import MB, peak_allocated
from benchmarks.shapes import RandomTokens
from elastic_core import ElasticModel
from elastic_core.model import architectures
from elastic_core.model.submodel import Submodel
from elastic_core.search.router import Router
from elastic_core.search.selection import Member
from elastic_core.search.space import ElasticSpace
from elastic_core.training.distributed.placement import place
from elastic_core.training.distributed.ranks import Ranks
from elastic_core.training.estimate.step_memory import Peak
from elastic_core.training.loop import train_step
from elastic_core.training.run import Run
from tasks.commands.plan import read_parent
from tasks.commands.plan_stages import stage_peak
from tasks.parents.targets import metric_of_family, resolve
from tasks.settings.load import read
from tasks.settings.merging import parameters
from tasks.settings.schema import Params

STAGES = ("train_short", "train_extended")
STEPS = 2  # in the second one the optimizer's moments are there


def measured(config, settings: Params, name: str, ranks: Ranks) -> int:
    """Bytes at most held by model, teacher, optimizer, and steps of the budget that takes most."""
    return peak_allocated(lambda: train(make_run(config, settings, name, ranks)))


def make_run(config, settings: Params, name: str, ranks: Ranks) -> Run:
    torch.manual_seed(0)
    stage, budgets, execution = getattr(settings, name), resolve(settings, config), settings.compute.execution
    # While the router learns, all budgets run the whole model; gates of the full one, which is pinned, learn nothing.
    budget = min(budgets, key=budgets.get) if name == "train_short" else max(budgets, key=budgets.get)
    stage = dataclasses.replace(stage, budget_shares=dict.fromkeys(budgets, 0.0) | {budget: 1.0})
    model, teacher = (
        place(random_model(config), ranks, execution, stage.precision, frozen) for frozen in (False, True)
    )
    data = RandomTokens(config.vocab_size, stage.sequence_length, document=-(-stage.sequence_length // 2))
    if name == "train_short":
        layers = tuple(range(architectures.num_layers(config)))
        space = ElasticSpace(config, settings.choices, layers, metric=metric_of_family(settings))
        router = Router(space, tuple(budgets.values()))
        return Run(
            model, stage, data, budgets, None, router, settings.routing, teacher, ranks=ranks, execution=execution
        )
    members = {budget: Member(target, Submodel()) for budget, target in budgets.items()}  # no other takes more
    return Run(
        model,
        stage,
        data,
        budgets,
        members,
        teacher=teacher,
        metric=metric_of_family(settings),
        ranks=ranks,
        execution=execution,
    )


def random_model(config) -> ElasticModel:
    """Small random weights: values that stay finite are all that memory asks for."""
    model = ElasticModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def train(run: Run) -> None:
    for _ in range(STEPS):
        train_step(run)
    assert not run.skipped


def compare(settings: Params, config) -> Iterator[tuple[str, Peak, int]]:
    """Per stage: its name, what is predicted and what is measured."""
    with group_of_one(settings) as ranks:
        for name in STAGES:
            yield name, stage_peak(name, settings, config), measured(config, settings, name, ranks)


@contextlib.contextmanager
def group_of_one(settings: Params) -> Iterator[Ranks]:
    """This process on its own; with one worker, the only rank of a group, which goes through all that shards do."""
    if settings.compute.workers == 0:
        yield Ranks()
        return
    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
        try:
            yield Ranks.current()
        finally:
            dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", nargs="?", default="default")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a parameter")
    arguments = parser.parse_args()
    settings = read(parameters(arguments.profile, overrides=arguments.set), f"profile {arguments.profile}")
    config, _ = read_parent(settings)
    for name, peak, real in compare(settings, config):
        print(f"{name}: predicted {peak.total / MB:.1f} MB ({peak.moment}), measured {real / MB:.1f} MB, "
              f"ratio {peak.total / real:.3f}")  # fmt: skip
        print("  " + ", ".join(f"{kind} {count / MB:.1f}" for kind, count in peak.kinds.items() if count))


if __name__ == "__main__":
    main()
