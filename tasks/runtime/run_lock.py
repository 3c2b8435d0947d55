"""One process at a time works on a run."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from elastic_core.config import ConfigError


@contextlib.contextmanager
def only_one(directory: Path, what: str) -> Iterator[None]:
    """Hold `directory` for this process. Raises ConfigError where another process holds it."""
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes the first one holds it for all
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"{what} already runs with these parameters and inputs (process {file.read().strip()}, which holds "
                f"{file.name}); wait for it, or stop it"
            ) from None
        file.truncate(0)
        print(os.getpid(), file=file, flush=True)
        yield
