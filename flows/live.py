"""A training stage in the UI while it runs: its progress, and a table of losses, both kept up to date."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate

from tasks.progress import metrics_file
from tasks.progress.durations import duration

REFRESH_SECONDS = 5.0


class Live:
    """Follows the rows of a stage that trains; give `watch` to flows.stages.reproduce."""

    def __init__(self, workspace: Path, log: Callable[[str], None]):
        self.workspace, self.log = workspace, log
        self.training: dict | None = None  # the event with which training began

    def watch(self, event: dict) -> None:
        """Take in an event of the stage; an empty one, about once a second, brings the artifacts up to date."""
        if event.get("event") == "training":
            self._begin(event)
        elif event.get("event") == "resumed":
            step, total = event["step"], self.training["num_steps"]
            self.log(f"{event['name']}: going on from its checkpoint of step {step:,} of {total:,}")
        elif self.training is not None and time.monotonic() - self.refreshed_at >= REFRESH_SECONDS:
            self.refresh()

    def refresh(self) -> None:
        """Bring the artifacts up to date, where the stage has any."""
        if self.training is None:
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

    def _begin(self, training: dict) -> None:
        self.training = training
        self.rows = metrics_file.NewRows(self.workspace / training["path"])
        self.last, self.means = None, {}
        key = training["name"].replace("_", "-")
        progress, description = self._progress()
        self.progress_id = create_progress_artifact(progress, key=f"{key}-progress", description=description)
        self.table_id = create_table_artifact(self._table(), key=f"{key}-losses", description=self._caption())
        self.refresh()

    def _progress(self) -> tuple[float, str]:
        """Percent done, and the sentence beside it."""
        name, total = self.training["name"], self.training["num_tokens"]
        if self.last is None:
            return 0.0, f"{name}: {total:,} tokens to train on; starting"
        done, rate = self.last["tokens"], self.last["tokens_per_second"]
        parts = [f"{name}: {done:,} of {total:,} tokens ({self.last['mode']})"]
        if rate is not None:
            parts.append(f"{rate:,.0f} tokens/s")
            parts.append(f"{duration(self.last['seconds_left'])} left")
        if self.last.get("skipped"):
            parts.append(f"{self.last['skipped']} steps skipped")
        return min(100.0, 100 * done / total), ", ".join(parts)

    def _caption(self) -> str:
        step = self.last["step"] if self.last else 0
        return (
            f"{self.training['name']}, step {step:,} of {self.training['num_steps']:,}. Running means in nats per "
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
