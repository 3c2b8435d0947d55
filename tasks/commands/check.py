"""`python -m tasks.commands.check` checks params.yaml before stages run for hours; `… check PROFILE` a profile.

It lists every problem, in two rounds. The first one checks all values, local paths and files, in less than half a
second. Only if nothing is wrong, the second one checks URLs, the parent's files, whether the parent can give the
budgets and sizes, and the benchmarks with lm-eval. It needs the parent's configuration in transformers' classes.
Importing torch and only these classes takes two to four seconds, because they import torch.distributed and compilers.
"""

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from elastic_core.config import ConfigError
from tasks.runtime.exit_status import errors_as_text
from tasks.settings import merging, remote_checks
from tasks.settings.budgets import read_family
from tasks.settings.load import FILE, check_values, read_file
from tasks.settings.local_checks import BEFORE_A_RUN
from tasks.settings.profiles import working_directory
from tasks.settings.schema import Params


def main(arguments: Sequence[str] = (), root: Path = merging.ROOT) -> None:
    """Check params.yaml in the working directory, or a profile of the checkout `root`. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m tasks.commands.check", description=__doc__)
    parser.add_argument("profile", nargs="?", help="a file in profiles/; default: params.yaml in the working directory")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a parameter")
    parser.add_argument("--budget", action="append", default=[], metavar="NAME=BUDGET", help="a member of a new family")
    given = parser.parse_args(arguments)
    if given.profile is None and not given.set and not given.budget:
        check(read_file(FILE))
        print(f"{FILE} is valid")
    else:
        check_profile(
            "default" if given.profile is None else given.profile,
            read_family(given.budget, "--budget"),
            given.set,
            root,
        )


def check_profile(
    profile: str, budgets: Mapping[str, float | str], overrides: Sequence[str], root: Path = merging.ROOT
) -> None:
    """Check the parameters that a run of a profile would have. Nothing is written.

    Relative paths start where the run works: in its workspace, or in the checkout as long as there is no workspace.
    Raises UserError; a problem starts with the file, or the option, that has the parameter.
    """
    values = merging.parameters(profile, root, budgets, overrides)
    with contextlib.chdir(working_directory(profile, root, budgets, overrides)):
        try:
            check(values)
        except ConfigError as error:
            own = merging.read_profile(profile, root)
            found = [_from_where(text, profile, own, budgets, overrides) for text in error.problems]
            raise ConfigError("\n".join(found)) from None
    for note in merging.inherited(profile, root):
        print(note)
    print(f"{merging.file_of(profile)} is valid")


def check(values: Mapping) -> None:
    """Check all parameters. Raises ConfigError with the problems of the first round that finds any."""
    settings = check_values(values, FILE, BEFORE_A_RUN)
    from tasks.evaluation.benchmark_checks import check_benchmarks
    from tasks.runtime.preflight import check_family, check_parent  # imports torch and transformers

    remote_checks.check(settings)
    check_family(settings, FILE)
    check_parent(settings, FILE)
    check_limits(settings, FILE)
    check_benchmarks(settings.evaluate.benchmarks, f"{FILE}: evaluate.benchmarks")


def check_limits(settings: Params, where: str) -> None:
    """Refuse time limits that are shorter than the plan (see `tasks.commands.plan`). Raises ConfigError."""
    if settings.time_limits and settings.compute.gpus_per_worker:
        from tasks.commands.plan import check_time_limits, read_parent  # slow, as above

        try:
            check_time_limits(settings, read_parent(settings)[0])
        except ConfigError as error:
            raise ConfigError("\n".join(f"{where}: {problem}" for problem in error.problems)) from None


def _from_where(problem: str, profile: str, own: Mapping, budgets: Mapping, overrides: Sequence[str]) -> str:
    """The problem, starting with the file or the option that has its parameter."""
    text = problem.removeprefix(f"{FILE}: ")
    key = text.partition(":")[0].split(".")
    if any(path[: len(key)] == key[: len(path)] for path, _ in map(merging.read_override, overrides)):
        return f"--set: {text}"
    if budgets and key[0] == "budgets":
        return f"--budget: {text}"
    content = own
    for name in key[:2]:  # a section and its parameter
        content = content.get(name) if isinstance(content, Mapping) else None
    is_missing = text.startswith(f"{'.'.join(key)}: missing")
    return problem if content is None and not is_missing else f"{merging.file_of(profile)}: {text}"


if __name__ == "__main__":
    with errors_as_text():
        main(sys.argv[1:])
