"""The key of a stage's run."""

from elastic_core.training.loop import train
from tasks.training import job
from tests.support.runs import TEXT, make_run, make_stage


def test_another_configuration_starts_anew(data, tmp_path, monkeypatch):
    """And the same one goes on with its own checkpoints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "DATA", data.directory)

    class Settings:
        seed = 0

    def steps(stage):
        made = job.make_job(Settings, "train_short", {"stage": stage}, [])
        return len(list(train(make_run(data, stage, checkpoints=made.directory))))

    stage, other = make_stage(loss=TEXT, steps=3), make_stage(loss=TEXT, steps=3, learning_rate=2e-3)
    assert [steps(stage), steps(stage), steps(other)] == [3, 0, 3]
