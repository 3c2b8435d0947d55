"""`python -m tasks.settings` checks params.yaml without torch, in under a second.

`python -m tasks.settings PROFILE …` checks the values of profiles, and opens none of the files that they name.
`python -m tasks.commands.check` also checks corpora, URLs, and whether the parent can give the budgets.
"""

import argparse
import sys

from elastic_core.errors import UserError
from tasks.settings.load import FILE, load, read
from tasks.settings.merging import file_of, parameters


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tasks.settings", description=__doc__)
    parser.add_argument("profile", nargs="*", help="a file in profiles/; default: params.yaml in the working directory")
    profiles = parser.parse_args().profile
    if not profiles:
        load()
        print(f"{FILE} is valid")
    for profile in profiles:
        read(parameters(profile), file_of(profile))
        print(f"{file_of(profile)} is valid")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(error.report())
