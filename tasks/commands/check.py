"""`python -m tasks.commands.check`: checks all of params.yaml in seconds, before stages run for hours.

It runs the checks of tasks.settings first, then checks the URLs, whether the parent can give the budgets, the parent's
files, and the benchmarks.
"""

from tasks.evaluation.benchmark_checks import check_benchmarks
from tasks.runtime.exit_status import errors_as_text
from tasks.runtime.preflight import check_family, check_parent
from tasks.settings import load, remote_checks


def main() -> None:
    settings = load.load()
    remote_checks.check(settings)
    check_family(settings, load.FILE)
    check_parent(settings, load.FILE)
    check_benchmarks(settings.evaluate.benchmarks, f"{load.FILE}: evaluate.benchmarks")
    print(f"{load.FILE} is valid")


if __name__ == "__main__":
    with errors_as_text():
        main()
