"""Optional dashboards for the training stages: TensorBoard and Weights & Biases, each through its own library."""

from __future__ import annotations

from pathlib import Path

from elastic_core.config import ConfigError
from tasks.settings.sections import Tracking


def scalars(row: dict) -> dict[str, float]:
    """The numbers of a row of metrics that are tracked, under names by which dashboards group them."""
    values = {name: row.get(name) for name in ("tokens_per_second", "learning_rate", "grad_norm", "skipped")}
    values["memory_gib"] = None if row.get("memory_bytes") is None else row["memory_bytes"] / 2**30
    for budget, numbers in row.get("budgets", {}).items():
        values |= {f"train/{name}/{budget}": numbers.get(name) for name in ("loss", "kl", "state", "budget_error")}
    return {name: value for name, value in values.items() if value is not None}


class TensorBoard:
    """Event files in one directory per run. Values stand over tokens, so stages and batch sizes share one axis."""

    def __init__(self, directory: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.make_writer, self.directory, self.writer = SummaryWriter, directory, None

    def write(self, row: dict) -> None:
        if self.writer is None:
            # A resumed run writes the steps after its checkpoint again; purge_step hides the first writing.
            self.writer = self.make_writer(str(self.directory), purge_step=row["tokens"], flush_secs=10)
        for name, value in scalars(row).items():
            self.writer.add_scalar(name, value, row["tokens"])

    def close(self, failed: bool) -> None:
        if self.writer is not None:
            self.writer.close()


class WandB:
    """A run of Weights & Biases, over tokens. A resumed run has the same id and goes on.

    W&B takes each step once. A resumed run repeats the steps after its checkpoint, with the same numbers; steps that
    the server has already are left out. Offline runs do not know what the server has, so they write them again.
    """

    def __init__(self, tracking: Tracking, key: str, directory: Path, configuration: dict):
        import wandb

        try:
            self.run = wandb.init(
                project=tracking.wandb,
                id=key,
                name=key,
                resume="allow",
                mode="offline" if tracking.wandb_mode == "offline" else None,  # None: as WANDB_MODE says
                dir=str(directory),
                config=configuration,
                settings=wandb.Settings(console="off"),  # capturing the terminal would break the progress bar
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"tracking.wandb: {tracking.wandb!r} could not be started: {error} Or set tracking.wandb_mode to "
                "offline, or tracking.wandb to null, in params.yaml"
            ) from error
        self.run.define_metric("tokens")
        self.run.define_metric("*", step_metric="tokens")

    def write(self, row: dict) -> None:
        if row["step"] >= self.run.starting_step:
            self.run.log(scalars(row) | {"tokens": row["tokens"]}, step=row["step"])

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def open_writers(tracking: Tracking, key: str, directory: Path, configuration: dict) -> list[TensorBoard | WandB]:
    """The writers that are on, for the run named `key`; `directory` is where W&B keeps its own files.

    Raises ConfigError, before any work, where one cannot be used.
    """
    tracking.check()
    writers = []
    if tracking.tensorboard is not None:
        writers.append(TensorBoard(Path(tracking.tensorboard) / key))
    if tracking.wandb is not None:
        directory.mkdir(parents=True, exist_ok=True)
        writers.append(WandB(tracking, key, directory, configuration))
    return writers
