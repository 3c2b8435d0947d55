"""Python's garbage collector during large imports.

torch and transformers make millions of objects that stay. The collector looks through them again and again while they
are imported, and once more when the process ends. That is a third of the time in which a stage starts.
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
