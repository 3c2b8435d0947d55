"""The work pool and the deployments, with forms that know the profiles and stages of the checkout.

`python -m flows.dashboard.deployments` writes the deployments again, with the environment of their runs from
ELASTIC_RUN_VARIABLES (JSON). The dashboard starts it when a profile or dvc.yaml changes: a form's lists are made when
the flow's file is read.
"""

import inspect
import json
import os
import sys
import time
from pathlib import Path

from flows.process.output import follow
from tasks.settings.merging import profile_names

ROOT = Path(__file__).resolve().parents[2]
POOL = "local"
FLOWS = {"flows/elastic.py:elastic": "full", "flows/compare.py:compare": "runs"}
VARIABLES = "ELASTIC_RUN_VARIABLES"
LOOK_SECONDS = 1.0  # between looks at the files that decide the forms


def create(environment: dict[str, str]) -> None:
    """Create the work pool and the deployments. Mark dead runs."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"), overwrite=True)
        mark_dead_runs(client)
    write(environment)


def write(environment: dict[str, str]) -> None:
    """Create the deployments, or bring them up to date. One run at a time; others wait."""
    from prefect.flows import Flow

    for entrypoint, name in FLOWS.items():
        flow = Flow.from_source(source=str(ROOT), entrypoint=entrypoint)
        options = {"work_pool_name": POOL, "concurrency_limit": 1, "job_variables": {"env": environment}}
        flow.to_deployment(name=name, description=description(flow), **options).apply()


class Forms:
    """Writes the deployments again when the files that decide their forms have changed."""

    def __init__(self, environment: dict[str, str]):
        self.environment, self.written_for, self.looked_at = environment, self._files(), time.monotonic()

    def keep_current(self) -> None:
        """Look at the files, at most once a second. Say it where they cannot be used, and try again when they change.

        A process of its own reads the flow: a file that is being edited must not end the dashboard.
        """
        if time.monotonic() - self.looked_at < LOOK_SECONDS:
            return
        self.looked_at, files = time.monotonic(), self._files()
        if files == self.written_for:
            return
        self.written_for = files
        command = [sys.executable, "-m", "flows.dashboard.deployments"]
        variables = {**self.environment, VARIABLES: json.dumps(self.environment)}
        status, lines = follow(command, ROOT, lambda line: None, variables)
        if status == 0:
            print("The forms know the changed profiles and stages; reload the page", flush=True)
        else:
            last = lines[-1] if lines else f"the update ended with exit status {status}"
            print(f"profiles/ or dvc.yaml have changed, but the forms keep their lists: {last}", flush=True)

    def _files(self) -> tuple:
        pipeline = ROOT / "dvc.yaml"
        return profile_names(ROOT), pipeline.stat().st_mtime_ns if pipeline.is_file() else None


def description(flow) -> str:
    """The flow's docstring for the UI: without the parameters, which the form explains, and one line per paragraph."""
    paragraphs = inspect.getdoc(flow.fn).partition("\n\nArgs:")[0].split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def mark_dead_runs(client) -> None:
    """Mark runs as ended that look alive although no worker has been started yet."""
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import StateType
    from prefect.states import Cancelled, Crashed

    alive = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    state = filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=alive))
    for run in client.read_flow_runs(flow_run_filter=filters.FlowRunFilter(state=state)):
        kind = Cancelled if run.state_type == StateType.CANCELLING else Crashed
        print(f"Run {run.name!r} was cut off; marking it as {kind.__name__.lower()}", flush=True)
        client.set_flow_run_state(run.id, kind(message="The dashboard or its worker ended during this run"), force=True)


if __name__ == "__main__":
    write(json.loads(os.environ[VARIABLES]))
