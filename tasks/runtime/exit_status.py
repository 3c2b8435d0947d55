"""How a stage ends: with a text instead of a traceback, and a status that tells whether another try may help."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

from elastic_core.errors import UserError
from elastic_core.io.storage import StorageUnavailable

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class StageError(RuntimeError):
    """A stage's work ended for a reason that another try does not remove."""


class StageInterrupted(StageError):
    """A stage's work ended for a reason that may be gone later: a server was away, or workers were lost."""


@contextlib.contextmanager
def errors_as_text() -> Iterator[None]:
    """End the process with the text of an error that its user can remove, and without a traceback.

    The status is EX_TEMPFAIL (75) where a server was away or workers were lost, and 1 for everything else.
    """
    try:
        yield
    except (StageInterrupted, StorageUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    except UserError as error:
        sys.exit(error.report())
    except StageError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.filename is not None:
            sys.exit(f"error: {error.filename}: not there; run the stage that makes it first")
        if error.errno not in FULL_DISK:
            raise
        sys.exit(f"error: {error}; make space and start again")
