"""Progress of work that is not training: a bar on a terminal, elsewhere a line every ten seconds."""

import sys

from tqdm import tqdm

LOG_SECONDS = 10.0


def progress_bar(what: str, total: int, unit: str, scaled: bool = False) -> tqdm:
    """A bar to `update`, as a context manager. `scaled`: write large numbers as 1.2M."""
    options = {"desc": what, "total": total, "unit": unit, "unit_scale": scaled, "disable": False}
    if sys.stderr.isatty():
        return tqdm(**options, leave=False, dynamic_ncols=True)
    return _Lines(**options, mininterval=LOG_SECONDS, miniters=1, delay=LOG_SECONDS)


class _Lines(tqdm):
    """A bar that is printed as lines, and says nothing at the end: the stage does."""

    def display(self, msg=None, pos=None) -> bool:
        print(str(self) if msg is None else msg, flush=True)
        return True

    def close(self) -> None:
        if not self.disable:
            self.leave, self.display = False, lambda msg=None, pos=None: True
            self.sp = lambda text: None
            super().close()
