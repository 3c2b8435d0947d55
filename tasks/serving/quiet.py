"""No progress bars and hints of transformers, in commands that print what a model says."""

import contextlib
from collections.abc import Iterator

import transformers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Switch off transformers' progress bars and hints, so that only the model's text is printed."""
    before, had_bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        if had_bars:
            transformers.logging.enable_progress_bar()
