"""Files of metrics: one row of JSON per training step, written by a stage and read by those who show its progress.

This module needs no torch: the flow reads the files too, in a process without torch.
"""

import contextlib
import math
import os
from pathlib import Path

from elastic_core.errors import UserError
from elastic_core.io.json_files import parse_json

SMOOTHING = 0.1  # weight of the newest loss in the mean that is shown


class NewRows:
    """Reads the rows of a JSON-lines file while another process adds to it.

    `skip`: leave out the rows that are there already.
    """

    def __init__(self, path: Path, skip: bool = False):
        self.path, self.position = Path(path), 0
        if skip and self.path.exists():
            self.position = self.path.read_bytes().rfind(b"\n") + 1  # a cut-off line will be dropped

    def read(self) -> list[dict]:
        """The rows since the last call. A damaged line is left out: it shall not end what shows progress."""
        if not self.path.exists():
            return []
        rows = []
        with open(self.path, "rb") as file:
            self.position = min(self.position, file.seek(0, os.SEEK_END))  # a cut-off line was dropped
            file.seek(self.position)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.position += len(line)
                with contextlib.suppress(UserError):
                    rows.append(parse_json(line, self.path))
        return rows


def smooth(means: dict[str, float], numbers: dict) -> None:
    """Update a budget's running means with a step's numbers, in place; null values change nothing."""
    for name in ("loss", "kl"):
        if (value := numbers.get(name)) is not None:
            means[name] = (1 - SMOOTHING) * means.get(name, value) + SMOOTHING * value
    if numbers.get("budget_error") is not None:
        means["budget_error"] = numbers["budget_error"]


def plain(value):
    """`value` with None for NaN and the infinities, which JSON cannot write."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path) -> list[dict]:
    """The rows of a file of metrics in the order of steps; of two rows of a step the later one counts.

    Raises UserError, which names the line, for a line that is not a row.
    """
    lines = path.read_bytes().split(b"\n")[:-1]  # text after the last line break is a cut-off line
    rows = (parse_json(line, f"{path}, line {number}", {"step": int}) for number, line in enumerate(lines, start=1))
    latest = {row["step"]: plain(row) for row in rows}
    return [latest[step] for step in sorted(latest)]


def drop_cut_off_line(path: Path) -> None:
    """Shorten a file to its last line break: a killed process may have written half a line."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
