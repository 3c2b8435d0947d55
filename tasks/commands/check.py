"""`python -m tasks.commands.check` checks params.yaml before stages run for hours; `… check PROFILE` a profile.

It lists every problem at once: of all values, local paths and files, of URLs, of the parent's files, and of what the
parent can give: budgets, sizes and lengths.
"""

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from elastic_core.config import ConfigError, Problems
from elastic_core.errors import named
from elastic_core.io.storage import StorageError, StorageUnavailable, is_url
from tasks.evaluation.benchmark_checks import check_benchmarks
from tasks.runtime import garbage_collector
from tasks.runtime.exit_status import errors_as_text
from tasks.settings import merging
from tasks.settings.budgets import read_family
from tasks.settings.load import FILE, is_sound, raise_problems, read_file, read_sections
from tasks.settings.local_checks import BEFORE_A_RUN, check_local
from tasks.settings.profiles import working_directory
from tasks.settings.schema import Params, located


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
    """Check all parameters. Raises ConfigError with all problems, in the order of the sections.

    A check is left out if something that it needs has a problem. Raises StorageUnavailable if the only problem is a
    server that does not answer.
    """
    problems = Problems()
    sections = read_sections(problems, values)
    check_local(problems, sections, BEFORE_A_RUN)
    sections = SimpleNamespace(**located(vars(sections)))
    unavailable = _add_remote_problems(problems, sections)
    if unavailable is None or not (hasattr(sections, "parent") and is_url(sections.parent.path)):
        _add_parent_problems(problems, sections)
    _add_benchmark_problems(problems, sections)
    _add_limit_problems(problems, sections)
    if unavailable is not None:
        with named(FILE):
            if not problems.found:
                raise unavailable
            problems.add(str(unavailable))
    raise_problems(problems, FILE)


@garbage_collector.paused()
def _add_remote_problems(problems: Problems, sections: SimpleNamespace) -> StorageUnavailable | None:
    """Add the problems of URLs. Returns the error of a server that does not answer."""
    from tasks.settings import remote_checks  # imports torch and transformers

    try:
        remote_checks.add_problems(problems, sections)
    except StorageUnavailable as error:
        return error


@garbage_collector.paused()
def _add_parent_problems(problems: Problems, sections: SimpleNamespace) -> None:
    from tasks.runtime.preflight import add_family_problems, add_parent_problems  # imports torch and transformers

    try:
        add_family_problems(problems, sections)
        add_parent_problems(problems, sections)
    except StorageUnavailable:
        raise
    except StorageError as error:
        problems.add(f"parent.path: {error}")


def _add_benchmark_problems(problems: Problems, sections: SimpleNamespace) -> None:
    if is_sound(problems, sections, "evaluate.benchmarks"):
        with problems.collecting():
            check_benchmarks(sections.evaluate.benchmarks)


def _add_limit_problems(problems: Problems, sections: SimpleNamespace) -> None:
    """Add time limits that are shorter than the plan (see `tasks.commands.plan`), which needs all training sections."""
    if problems.found or not (sections.time_limits and sections.compute.gpus_per_worker):
        return
    from tasks.commands.plan import check_time_limits, read_parent  # here, because it imports torch

    settings = Params(**vars(sections)).completed()
    with problems.collecting():
        check_time_limits(settings, read_parent(settings)[0])


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
