"""`python -m tasks.settings` checks params.yaml without torch, in under a second.

`python -m tasks.commands.check` also checks corpora, URLs, and whether the parent can give the budgets.
"""

import sys

from elastic_core.errors import UserError
from tasks.settings.load import FILE, load

if __name__ == "__main__":
    try:
        load()
    except UserError as error:
        sys.exit(error.report())
    print(f"{FILE} is valid")
