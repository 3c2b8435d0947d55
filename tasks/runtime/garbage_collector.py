"""Python's garbage collector during large imports.

torch and transformers make millions of objects that stay. The collector looks through them again and again while they
are imported, and once more when the process ends: a quarter of the time of a process that does little else.
"""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """No collections in the block, and none later of what is there at its end (`gc.freeze`)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
