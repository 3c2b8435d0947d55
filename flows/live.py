"""What a training stage shows in the UI while it runs: how far it is, and a table of losses, both kept up to date."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate

from tasks.progress import metrics_file

REFRESH_SECONDS = 5.0


class Live:
    """Follows the rows that a stage's output announces; use it as the stage's log.

    Rows are looked at when the stage prints a line, which a training stage does every few seconds, and at the end.
    """

    def __init__(self, workspace: Path, log: Callable[[str], None]):
        self.workspace, self.log = workspace, log
        self.announcement: metrics_file.Announcement | None = None

    def __call__(self, line: str) -> None:
        """Take in one line of the stage's output."""
        self.log(line)
        if announcement := metrics_file.read_announcement(line):
            self._begin(announcement)
        elif self.announcement is not None and time.monotonic() - self.refreshed_at >= REFRESH_SECONDS:
            self.refresh()

    def refresh(self) -> None:
        """Bring the artifacts up to date, where the stage has any."""
        if self.announcement is None:
            return
        for row in self.rows.read():
            self.last = row
            for budget, numbers in row["budgets"].items():
                mean = self.means.setdefault(budget, {})
                metrics_file.smooth(mean, numbers)
                mean["step"] = row["step"]
        update_progress_artifact(self.progress_id, *self._progress())
        update = ArtifactUpdate(data=json.dumps(self._table()), description=self._caption())
        with get_client(sync_client=True) as client:
            client.update_artifact(self.table_id, update)
        self.refreshed_at = time.monotonic()

    def _begin(self, announcement: metrics_file.Announcement) -> None:
        self.announcement = announcement
        self.rows = metrics_file.NewRows(self.workspace / announcement.path)
        self.last, self.means = None, {}
        key = announcement.name.replace("_", "-")
        progress, description = self._progress()
        self.progress_id = create_progress_artifact(progress, key=f"{key}-progress", description=description)
        self.table_id = create_table_artifact(self._table(), key=f"{key}-losses", description=self._caption())
        self.refresh()
        if self.last is not None:
            done, total = self.last["step"], announcement.num_steps
            self.log(
                f"{announcement.name}: came to step {done:,} of {total:,} before; going on from its newest checkpoint"
            )

    def _progress(self) -> tuple[float, str]:
        """Percent done, and the sentence beside it."""
        name, total = self.announcement.name, self.announcement.num_tokens
        if self.last is None:
            return 0.0, f"{name}: {total:,} tokens to train on; starting"
        done, rate = self.last["tokens"], self.last["tokens_per_second"]
        parts = [f"{name}: {done:,} of {total:,} tokens ({self.last['mode']})"]
        if rate is not None:
            parts.append(f"{rate:,.0f} tokens/s")
            parts.append(f"{metrics_file.duration(self.last['seconds_left'])} left")
        if self.last.get("skipped"):
            parts.append(f"{self.last['skipped']} steps skipped")
        return min(100.0, 100 * done / total), ", ".join(parts)

    def _caption(self) -> str:
        step = self.last["step"] if self.last else 0
        return (
            f"{self.announcement.name}, step {step:,} of {self.announcement.num_steps:,}. Running means in nats per "
            "token; the budget error is how far the expected cost is from its target"
        )

    def _table(self) -> list[dict]:
        """A row per budget, the same keys in each: the UI takes its columns from the first."""
        rows = [
            {
                "budget": budget,
                "loss": _rounded(mean.get("loss")),
                "KL to teacher": _rounded(mean.get("kl")),
                "budget error": f"{mean['budget_error']:.2%}" if "budget_error" in mean else "–",
                "last step": mean["step"],
            }
            for budget, mean in self.means.items()
        ]
        return rows or [{"budget": "–", "loss": "–", "KL to teacher": "–", "budget error": "–", "last step": 0}]


def _rounded(value: float | None) -> float | str:
    return "–" if value is None else round(value, 4)
