"""How a stage ends: with a text instead of a traceback, and a status that tells whether trying again may help."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from elastic_core.config import ConfigError
from elastic_core.io import storage
from tasks.runtime.launch import FULL_DISK, StageError, StageInterrupted

PACKAGES = [Path(storage.__file__).parent, Path(__file__).parent]


@contextlib.contextmanager
def errors_as_text() -> Iterator[None]:
    """End the process with the text of an error that its user can mend, and without a traceback.

    The status is EX_TEMPFAIL (75) where a server was away or workers were lost, and 1 for all that has to be changed.
    """
    try:
        yield
    except (StageInterrupted, storage.StorageUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    except (StageError, ConfigError, storage.StorageError) as error:
        sys.exit(f"error: {error}")
    except ValueError as error:
        if not _is_for_the_user(error):
            raise
        sys.exit(f"error: {error}")
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.filename is not None:
            sys.exit(f"error: {error.filename}: not there; run the stage that makes it first")
        if error.errno not in FULL_DISK:
            raise
        sys.exit(f"error: {error}; make space and start again")


def _is_for_the_user(error: ValueError) -> bool:
    """Whether a `raise` of our own raised it; others' texts say too little, and may be of a mistake of ours."""
    end = traceback.extract_tb(error.__traceback__)[-1]
    return end.line.startswith("raise") and any(Path(end.filename).is_relative_to(package) for package in PACKAGES)
