"""Progress of work that is not training: a bar on a terminal, elsewhere a line every ten seconds."""

import io
import sys

from tqdm import tqdm

LOG_SECONDS = 10.0


def progress_bar(what: str, total: int | None, unit: str, scaled: bool = False) -> tqdm:
    """A bar to `update`, as a context manager. `total`: None if unknown. `scaled`: write large numbers as 1.2M."""
    options = {"desc": what, "total": total, "unit": unit, "unit_scale": scaled, "disable": False}
    if sys.stderr.isatty():
        return tqdm(**options, leave=False, dynamic_ncols=True)
    nowhere = io.StringIO()  # takes the characters with which tqdm clears a bar at its end
    return _Lines(**options, file=nowhere, leave=False, mininterval=LOG_SECONDS, miniters=1, delay=LOG_SECONDS)


class Bars:
    """Bars by name, for work that calls `show(what, done, total)`. `unit`: of what is done."""

    def __init__(self, name: str, unit: str):
        self.name, self.unit = name, unit
        self.bars: dict[str, tqdm] = {}

    def show(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` is done. A bar that is complete is closed."""
        if what not in self.bars:
            self.bars[what] = progress_bar(f"{self.name}: {what}", total, self.unit)
        self.bars[what].update(done - self.bars[what].n)
        if done == total:
            self.bars.pop(what).close()


class _Lines(tqdm):
    """A bar that is printed as lines. Its end prints nothing: the stage itself says that it has ended."""

    def display(self, msg=None, pos=None) -> bool:
        if msg is None:  # an empty text clears the bar
            print(self, flush=True)
        return True
