"""The parent as a teacher: where its logits are stored, and what is refused before any work starts."""

import dataclasses
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from elastic_core.config import ConfigError
from tasks.runs.job import Job
from tasks.settings import cross_checks
from tasks.settings.load import read
from tasks.settings.merging import parameters
from tasks.training.teacher import READ, _key

CACHED = ["train_short.teacher=cached", "train_short.loss.state_weight=0.0"]


def settings_of(*overrides):
    return read(parameters(overrides=overrides), "params.yaml")


def test_runs_that_differ_in_what_the_teacher_does_not_see_share_its_logits():
    stage = settings_of(*CACHED).train_short
    job = Job("train_short", "key", {"files": dict.fromkeys(READ, "digest"), "libraries": {"torch": "2"}})
    key = _key(job, stage, seed=2)
    assert key == _key(job, dataclasses.replace(stage, learning_rate=1.0, budget_shares={"full": 1.0}), seed=2)
    changed = [dataclasses.replace(stage, kept_logits=8), dataclasses.replace(stage, sequence_length=24)]
    loss = dataclasses.replace(stage.loss, temperature=2.0)
    changed.append(dataclasses.replace(stage, loss=loss))
    records = [job.record | {"files": job.record["files"] | {path: "another digest"}} for path in READ]
    records.append(job.record | {"libraries": {"torch": "3"}})
    keys = {_key(job, each, seed=2) for each in changed} | {_key(job, stage, seed=3)}
    keys |= {_key(Job("train_short", "key", record), stage, seed=2) for record in records}
    assert len(keys) == 4 + len(READ) + 1 and key not in keys


def test_what_the_logits_depend_on_is_known_of_every_stage():
    stages = YAML(typ="safe").load(Path("dvc.yaml"))["stages"]
    assert all(set(READ) <= set(stages[name]["deps"]) for name in ("train_short", "train_extended"))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["train_short.teacher=cached"], r"train_short.loss.state_weight: got 3.0; allowed: 0 with teacher cached"),
        ([*CACHED, "compute.storage=s3://bucket/x"], r"compute.storage: got 's3://bucket/x'; allowed: a directory"),
        (
            ["compute.execution.offload_student=true"],
            r"offload_student: got True; allowed: false with compute.workers 0",
        ),
        (["compute.execution.context_parallel=2"], r"context_parallel: got 2; allowed: a divisor of .* workers \(1\)"),
        (
            ["compute.workers=2", "compute.execution.context_parallel=2", "train_short.sequence_length=47"],
            r"train_short.sequence_length: got 47; allowed: a multiple of compute.execution.context_parallel \(2\)",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(overrides, problem):
    with pytest.raises(ConfigError, match=problem):
        settings_of(*overrides)


@pytest.mark.parametrize(("installed", "offloaded"), [(False, "false"), (True, "true")])
def test_8_bit_moments_need_torchao_and_moments_on_the_gpu(monkeypatch, installed, offloaded):
    monkeypatch.setattr(cross_checks, "is_installed", lambda package: installed)
    values = ["train_short.optimizer=adamw8bit", "compute.workers=2", f"compute.execution.offload_student={offloaded}"]
    reason = "offload_student" if installed else r"torchao is not installed \(pip install .*low-bit"
    with pytest.raises(ConfigError, match=rf"train_short.optimizer: got 'adamw8bit'; allowed: adamw.*{reason}"):
        settings_of(*values)


def test_workers_that_share_sequences_need_fewer_of_them():
    shared = ["compute.workers=4", "compute.execution.context_parallel=4", "train_short.microbatches=20",
              "train_extended.microbatches=10", "parent.training.microbatches=10"]  # fmt: skip
    assert settings_of(*shared).compute.execution.context_parallel == 4  # one sequence in each microbatch
