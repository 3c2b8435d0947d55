"""Stage `train_short`: train a family of submodels from the sorted parent, on short sequences.

At first, the router and the model learn together which sizes each budget keeps. Once the router's choice has settled,
the rest of the stage trains the chosen submodels as slices of the model. Both parts use elastic_core/training/loop.py.
"""

from pathlib import Path

import torch

from elastic_core.model import hf
from elastic_core.search.importance.ranking import Ranking
from elastic_core.search.path import path_between
from elastic_core.search.router import Router
from elastic_core.search.selection import check_reachable
from elastic_core.search.space import ElasticSpace
from elastic_core.training.distributed import model_files
from elastic_core.training.distributed.ranks import Ranks
from tasks.parents.targets import metric_of_family, resolve
from tasks.runs import provenance
from tasks.settings.load import load
from tasks.settings.schema import Params
from tasks.training.family import make_run, run_to_end, save_comparison, save_family
from tasks.training.start import run_stage

RANK = Path("artifacts/rank")


def main() -> None:
    settings = load()
    check_budgets(settings)
    run_stage(work, settings, "train_short", settings.train_short)


def check_budgets(settings: Params) -> None:
    """Raise ConfigError if the budgets cannot be reached.

    Earlier checks of the budgets had to guess which layers a smaller depth drops. Now stage `rank` has decided it.
    """
    space = make_space(settings, hf.read_config(RANK / "model"))
    check_reachable(space, resolve(settings, space.config))


def make_space(settings: Params, config) -> ElasticSpace:
    """All combinations of `choices`, with the layer ranking of stage `rank` and the cost metric of the budgets."""
    ranking = Ranking.load(RANK / "ranking.json")
    return ElasticSpace(config, settings.choices, ranking.depth, metric=metric_of_family(settings))


def work(arguments: dict, ranks: Ranks) -> None:
    """The stage's work on one worker: load, train, save.

    The settings are those of the job. They are passed in, because params.yaml may have changed since the start.
    """
    settings, job = arguments["settings"], arguments["job"]
    stage, source = settings.train_short, RANK / "model"
    model = model_files.from_pretrained(source, ranks, settings.compute.execution, stage.precision)
    torch.manual_seed(settings.seed)  # for the router's initial weights
    space, budgets = make_space(settings, model.config), resolve(settings, model.config)
    router = Router(space, tuple(budgets.values()))
    run = make_run(settings, job, stage, settings.seed + 2, model, budgets, ranks, router=router)
    run_to_end(run, settings, job, job.out / "metrics.jsonl")
    save_comparison(run, job)
    earlier = provenance.read_records("prepare_data", "parent", "rank")
    save_family(run, job, source, path_between(space, run.indices), earlier)
