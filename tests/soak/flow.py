"""The flow's part of a trial: one stage as the flow `elastic` runs it, in the workspace where this is started."""

from pathlib import Path

from prefect import flow

from flows import elastic


@flow(name="soak")
def soak(stage: str, workspace: str) -> None:
    elastic.run_stage.with_options(name=stage, task_run_name=stage)(stage, Path(workspace))


if __name__ == "__main__":
    soak("train_short", str(Path.cwd()))
