"""`python -m tasks.commands.check`: everything that can be wrong with params.yaml, before a stage has cost hours.

First what tasks.settings checks, then the places behind URLs, then whether the parent can give the budgets.
"""

from tasks.runtime.exit_status import errors_as_text
from tasks.runtime.preflight import check_family
from tasks.settings import load, remote_checks


def main() -> None:
    settings = load.load()
    remote_checks.check(settings)
    check_family(settings, load.FILE)
    print(f"{load.FILE} is valid")


if __name__ == "__main__":
    with errors_as_text():
        main()
