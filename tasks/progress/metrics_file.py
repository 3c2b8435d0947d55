"""Files of metrics, a row of JSON per step: written by a training stage, read by whoever shows how far it is.

Needs nothing beyond the standard library: the flow reads them as well, in a process without torch.
"""

import json
import math
import os
from pathlib import Path

SMOOTHING = 0.1  # weight of the newest loss in the mean that is shown


class NewRows:
    """Rows that are added to a file of metrics while somebody else writes it.

    From the beginning, or, where `skip`, after those that are there already.
    """

    def __init__(self, path: Path, skip: bool = False):
        self.path, self.position = Path(path), 0
        if skip and self.path.exists():
            self.position = self.path.read_bytes().rfind(b"\n") + 1  # a cut-off line will be dropped

    def read(self) -> list[dict]:
        """The rows since the last call."""
        if not self.path.exists():
            return []
        rows = []
        with open(self.path, "rb") as file:
            self.position = min(self.position, file.seek(0, os.SEEK_END))  # a line that was cut off is gone
            file.seek(self.position)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.position += len(line)
                rows.append(json.loads(line))
        return rows


def smooth(means: dict[str, float], numbers: dict) -> None:
    """Move a budget's running means towards a step's numbers, in place; what is null changes nothing."""
    for name in ("loss", "kl"):
        if (value := numbers.get(name)) is not None:
            means[name] = (1 - SMOOTHING) * means.get(name, value) + SMOOTHING * value
    if numbers.get("budget_error") is not None:
        means["budget_error"] = numbers["budget_error"]


def plain(value):
    """`value` with null in place of the floats that JSON does not have: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path) -> list[dict]:
    """The rows of a file of metrics by step, also of one that is still written; a resumed step's later row wins."""
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line break is cut off
    latest = {row["step"]: plain(row) for row in map(json.loads, lines)}
    return [latest[step] for step in sorted(latest)]


def drop_cut_off_line(path: Path) -> None:
    """Shorten a file of lines to its last line break: a kill may have cut its last line short."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
