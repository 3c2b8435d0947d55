"""The work of one process: `python -m benchmarks.evidence.work DIRECTORY` does the job in DIRECTORY/job.json.

The stages of the pipeline do the work, in a directory that looks like a workspace. A training job that was stopped goes
on from its checkpoints. Its result is written last and whole, and then its directory is removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from benchmarks.evidence.jobs import RANK, Job, digest_of, settings_of
from elastic_core import Submodel, extract
from elastic_core.data.loader import TokenData
from elastic_core.export import elastic_checkpoint
from elastic_core.io.atomic import write_text
from elastic_core.io.json_files import read_json
from elastic_core.model import hf
from elastic_core.search.selection import Member
from elastic_core.search.uniform import uniform_counterpart
from elastic_core.training.distributed import model_files
from elastic_core.training.distributed.ranks import Ranks
from tasks import rank, train_extended, train_short
from tasks.evaluation.text_scores import held_out_scores
from tasks.parents.targets import metric_of_family
from tasks.runs import job as runs
from tasks.runs import lock, provenance
from tasks.runtime.exit_status import errors_as_text
from tasks.runtime.quiet import silence_libraries
from tasks.settings.merging import ROOT
from tasks.settings.schema import Params
from tasks.training.family import make_run, run_to_end, save_family

SORTED, FIRST = Path("artifacts/rank"), Path("artifacts/train_short")
FILE = "job.json"


def result_path(root: Path, digest: str) -> Path:
    """The file with the result of a job, in the directory of all jobs."""
    return root / f"{digest}.json"


def prepare(root: Path, job: Job) -> Path:
    """Make the directory of a job: its description, and links to data, parent and ranking. Returns the directory."""
    directory = root / job.digest
    (directory / "artifacts").mkdir(parents=True, exist_ok=True)
    links = {name: Path(job.artifacts) / name for name in ("data", "parent")}
    if job.rank is not None:
        links["rank"] = root.resolve() / job.rank / "artifacts" / "rank"
    for name, target in links.items():
        link = directory / "artifacts" / name
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    write_text(directory / FILE, json.dumps(dataclasses.asdict(job)) + "\n")
    return directory


def do(directory: Path) -> dict:
    """Do the job of a directory, and write its result beside the directory."""
    content = read_json(directory / FILE)
    job = Job(**{**content, "stages": tuple(content["stages"])})
    begin, root = time.monotonic(), directory.resolve().parent
    with lock.only_one(str(directory.resolve()), job.title), contextlib.chdir(directory):
        settings = settings_of(job)
        result = do_ranking(settings) if job.kind == RANK else do_training(settings, job, root)
        _, clean = provenance.read_commit(ROOT)
        # The last commit that changed the pipeline's code: later ones do not change results.
        commit = provenance.git(ROOT, "log", "-1", "--format=%H", "--", *provenance.CODE)
        described = {name: value for name, value in content.items() if name != "values"}
        result |= {"job": described, "commit": commit, "clean": clean, "seconds": time.monotonic() - begin}
        write_text(result_path(root, job.digest), json.dumps(result, indent=1) + "\n")
    if job.kind != RANK:
        shutil.rmtree(directory, ignore_errors=True)
    return result


def do_ranking(settings: Params) -> dict:
    """Sort the parent, and measure it."""
    rank.work({"settings": settings, "job": runs.Job("rank", "evidence", {"stage": "rank"})}, Ranks())
    return {
        "parent": held_out_scores(settings.evaluate, TokenData("artifacts/data"), load_model("artifacts/parent"), None)
    }


def do_training(settings: Params, job: Job, root: Path) -> dict:
    """Train a family or a member alone, and measure every member before and after."""
    begin, cpu = time.monotonic(), time.process_time()
    final = train(settings, job, members_of(settings, job, root))
    times = {"training_seconds": time.monotonic() - begin, "cpu_seconds": time.process_time() - cpu}
    stages = [getattr(settings, name) for name in job.stages]
    entries = elastic_checkpoint.read(final)["budgets"]
    data, parent = TokenData("artifacts/data"), load_model("artifacts/parent")
    members = {}
    for name, entry in entries.items():
        submodel = Submodel(**entry["submodel"])
        members[name] = {
            "target": entry["target"],
            "submodel": entry["submodel"],
            "num_parameters": entry["num_parameters"],
            "tokens": sum(share_of(stage, name, len(entries)) * stage.num_tokens() for stage in stages),
            "zero_shot": zero_shot_scores(settings, data, parent, submodel),
            "trained": scores(settings, data, parent, final, submodel),
        }
    return {"members": members, "tokens": sum(stage.num_tokens() for stage in stages), **times}


def share_of(stage, budget: str, number: int) -> float:
    """The share of a stage's tokens that trains a budget."""
    shares = stage.budget_shares
    return shares[budget] / sum(shares.values()) if shares else 1 / number


def members_of(settings: Params, job: Job, root: Path) -> dict[str, Member] | None:
    """The fixed members of a job: those given, or the uniform counterparts of another job's. None: a router chooses."""
    given = job.members if job.source is None else read_json(result_path(root, job.source))["members"]
    if given is None:
        return None
    found = {name: Member(entry["target"], Submodel(**entry["submodel"])) for name, entry in given.items()}
    if job.source is None:
        return found
    config, metric = hf.read_config(SORTED / "model"), metric_of_family(settings)
    return {
        name: dataclasses.replace(member, submodel=uniform_counterpart(config, member.submodel, metric))
        for name, member in found.items()
    }


def train(settings: Params, job: Job, members: dict[str, Member] | None) -> Path:
    """Train through the stages of a job. Returns the directory of the elastic checkpoint. Finished stages stay."""
    if "train_short" in job.stages:
        if not (FIRST / "model" / elastic_checkpoint.FILE).is_file():
            given = {"settings": settings, "job": stage_job("train_short")}
            train_short.work(given, Ranks()) if members is None else train_fixed(settings, given["job"], members)
    else:
        begin_untrained(settings, members)
    if "train_extended" not in job.stages:
        return FIRST / "model"
    last = stage_job("train_extended")
    if not (last.out / "model" / elastic_checkpoint.FILE).is_file():
        train_extended.work({"settings": settings, "job": last}, Ranks())
    return last.out / "model"


def stage_job(name: str) -> runs.Job:
    """The run of a stage inside this job. The job's directory is its own, so the key can be the same everywhere."""
    record = {"stage": name, "key": "evidence", "commit": None, "clean": False, "started": provenance.now()}
    empty = {"parameters": {}, "libraries": {}, "files": {}, "fingerprints": {}}
    return runs.Job(name, "evidence", record | empty, shown_by_launcher=True)


def train_fixed(settings: Params, job: runs.Job, members: dict[str, Member]) -> None:
    """Stage 1 with given members in place of a router."""
    ranks, stage, source = Ranks(), settings.train_short, SORTED / "model"
    model = model_files.from_pretrained(source, ranks, settings.compute.execution, stage.precision)
    budgets = {name: member.target for name, member in members.items()}
    family = {"members": members, "metric": metric_of_family(settings)}
    run = make_run(settings, job, stage, settings.seed + 2, model, budgets, ranks, **family)
    run_to_end(run, settings, job, job.out / "metrics.jsonl")
    save_family(run, job, source, [], [])


def begin_untrained(settings: Params, members: dict[str, Member]) -> None:
    """The sorted parent with these members, as stage 2 reads what stage 1 has made."""
    shutil.copytree(SORTED / "model", FIRST / "model", dirs_exist_ok=True)
    elastic_checkpoint.write(FIRST / "model", hf.read_config(SORTED / "model"), members, [], metric_of_family(settings))


def zero_shot_scores(settings: Params, data: TokenData, parent, submodel: Submodel) -> dict:
    """The scores of a submodel of the sorted parent; computed once for all jobs with the same ranking."""
    path = SORTED.resolve().parents[1] / f"zero-shot-{digest_of([submodel.to_dict(), settings.evaluate.tasks])}.json"
    if not path.is_file():
        write_text(path, json.dumps(scores(settings, data, parent, SORTED / "model", submodel)) + "\n")
    return read_json(path)


def scores(settings: Params, data: TokenData, parent, directory: Path, submodel: Submodel) -> dict:
    """The scores of a submodel as stage evaluate measures them: held-out text, and test tasks if the job has some."""
    out = Path("extracted")
    extract(directory, submodel, out, settings.extract.heterogeneous)
    model = load_model(out)
    found = held_out_scores(settings.evaluate, data, model, parent)
    if settings.evaluate.tasks:
        from tasks.evaluation.lm_eval_tasks import reasoning_scores  # slow

        found["tasks"] = reasoning_scores(settings.evaluate, data, model)
    return found


def load_model(directory: str | Path):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=True).eval()


def main() -> None:
    silence_libraries()
    transformers.utils.logging.disable_progress_bar()
    with errors_as_text():
        do(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
