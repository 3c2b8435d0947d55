"""Evidence for what the project claims: trains a profile's family in several ways (arms), and compares the results.

`python -m benchmarks.evidence [--profile NAME] [--arms NAME …] [--seeds 5] [--processes 2]`. An arm is a set of
parameters that differ from the profile's (benchmarks/evidence/arms.yaml). Every arm is trained with several seeds of
the order of the data and of the router, from one parent: that of the profile's finished run. Finished jobs are kept, so
a second call goes on. Writes evidence-PROFILE.md, .json and .svg.
"""

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.evidence import arms as all_arms
from benchmarks.evidence import jobs, report, schedule, work
from elastic_core.config import require
from elastic_core.errors import UserError
from tasks.settings.merging import ROOT
from tasks.settings.profiles import workspace_of

RESULTS = ROOT / "benchmarks/results"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "benchmarks.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--profile", default="default", help="name of a profile, or a YAML file like those in profiles/")
    made.add_argument("--artifacts", type=Path, help="directory with data/ and parent/; default: of the profile's run")
    made.add_argument("--members", type=Path, help="elastic.json with the sizes of fixed members; default: of the run")
    made.add_argument("--arms", nargs="+", metavar="NAME", help="default: all arms")
    made.add_argument("--arms-file", type=Path, action="append", default=[], help="YAML file with more arms")
    made.add_argument("--seeds", type=int, default=5, help="jobs per arm")
    made.add_argument("--router-seeds", type=int, help="jobs per arm with a router; default: twice --seeds")
    made.add_argument("--processes", type=int, default=2, help="jobs at a time, each on one thread; 0: in this process")
    made.add_argument("--steps-scale", type=float, default=1.0, help="share of the training steps, for a quick try")
    made.add_argument("--tasks", action="store_true", help="measure the test tasks too (chains, recall)")
    made.add_argument("--only-report", action="store_true", help="write the results of the jobs that are done")
    made.add_argument("--jobs", type=Path, help="directory of jobs; default: benchmarks/results/jobs-PROFILE")
    made.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    return made


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the processes of jobs end too
    try:
        run(given)
    except UserError as error:
        sys.exit(error.report())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")


def run(given: argparse.Namespace) -> None:
    """Do the jobs that are missing, and write the results. Raises UserError."""
    router_seeds = 2 * given.seeds if given.router_seeds is None else given.router_seeds
    require(given.seeds >= 1, "--seeds", given.seeds, "1 or more")
    require(router_seeds >= given.seeds, "--router-seeds", router_seeds, f"as many as --seeds ({given.seeds}), or more")
    require(given.processes >= 0, "--processes", given.processes, "1 or more, or 0: in this process")
    require(given.steps_scale > 0, "--steps-scale", given.steps_scale, "above 0")
    name = Path(given.profile).stem
    chosen = all_arms.choose(all_arms.read_arms([all_arms.DEFAULTS, *given.arms_file]), given.arms)
    plan = plan_of(given, router_seeds, any(arm.members == all_arms.FIXED for arm in chosen))
    rankings, groups = jobs.jobs_of(plan, chosen)
    root = (given.jobs or RESULTS / f"jobs-{name}").absolute()
    # One seed of all arms after the other: a call that is stopped has something to compare.
    trained = sorted((job for group in groups.values() for job in group), key=lambda job: job.seed)
    needed, problems = [*rankings, *trained], []
    if not given.only_report:
        problems = schedule.run(needed, root, work.prepare, work.do, given.processes)
    results = schedule.results_of(root, needed)
    if not results.keys() & {job.digest for job in trained}:
        raise UserError("\n".join(problems) or f"{root}: no job of these arms has been done with these parameters")
    print("\n" + report.write(given.out, name, plan, chosen, groups, results))
    if problems:
        raise UserError("\n".join(["not all jobs were done; the same command tries again", *problems]))


def plan_of(given: argparse.Namespace, router_seeds: int, needs_members: bool) -> jobs.Plan:
    """The plan of the arguments. Raises UserError if data, parent or members are not there."""
    artifacts = given.artifacts
    if artifacts is None:
        if given.profile.endswith((".yaml", ".yml")):
            raise UserError(f"--profile: got the file {given.profile}; give the directory of its data with --artifacts")
        artifacts = workspace_of(given.profile) / "artifacts"
    artifacts = artifacts.absolute()
    jobs.input_digests(artifacts)
    members = None
    if needs_members:
        path = given.members or artifacts / "train_extended" / "model" / "elastic.json"
        members = jobs.read_members(path, artifacts / "parent")
    return jobs.Plan(
        given.profile,
        artifacts,
        members,
        given.seeds,
        router_seeds,
        given.steps_scale,
        given.tasks,
    )


if __name__ == "__main__":
    main()
