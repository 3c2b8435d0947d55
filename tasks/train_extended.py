"""Stage `train_extended`: train the family of `train_short` further, on longer sequences.

The submodels are fixed and there is no router. Each microbatch computes with the slice of one budget.
"""

from pathlib import Path

from elastic_core.cost.metrics import read_metric
from elastic_core.export import elastic_checkpoint
from elastic_core.io.provenance_file import read_provenance
from elastic_core.model.submodel import Submodel
from elastic_core.search.selection import Member
from elastic_core.training.distributed import model_files
from elastic_core.training.distributed.ranks import Ranks
from tasks.settings.load import load
from tasks.training.family import make_run, run_to_end, save_family
from tasks.training.start import run_stage

SHORT = Path("artifacts/train_short/model")


def main() -> None:
    settings = load()
    run_stage(work, settings, "train_extended", settings.train_extended)


def work(arguments: dict, ranks: Ranks) -> None:
    """The stage's work on one worker: load, train, save. The settings are those of the job."""
    settings, job = arguments["settings"], arguments["job"]
    stage, content = settings.train_extended, elastic_checkpoint.read(SHORT)
    model = model_files.from_pretrained(SHORT, ranks, settings.compute.execution, stage.precision)
    members = {
        name: Member(entry["target"], Submodel(**entry["submodel"])) for name, entry in content["budgets"].items()
    }
    budgets = {name: member.target for name, member in members.items()}
    family = {"members": members, "metric": read_metric(content["cost"])}
    run = make_run(settings, job, stage, settings.seed + 3, model, budgets, ranks, **family)
    run_to_end(run, settings, job, job.out / "metrics.jsonl")
    path = [Submodel(**values) for values in content["path"]]
    save_family(run, job, SHORT, path, read_provenance(SHORT))
