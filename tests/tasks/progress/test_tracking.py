"""Dashboards: what their own libraries read back from the files of a run that was killed and went on."""

import json
import math
import os
import struct
import sys
import time
from pathlib import Path

import pytest
import yaml

from elastic_core import config
from elastic_core.config import ConfigError
from tasks.progress.display import Recorder
from tasks.progress.tracking import Tracking, scalars
from tasks.settings.load import load
from tasks.settings.sections import is_installed
from tests.support.pipeline.metric_rows import NAN, row, stage
from tests.support.pipeline.stages import check_parameters

ROOT = Path(__file__).resolve().parents[3]
KEY = "train_short-0123456789abcdef"


@pytest.fixture
def run(tmp_path):
    return tmp_path / "checkpoints" / KEY / "metrics.jsonl"


def record(run, tracking, steps, loss=2.0):
    """Some steps of a run; the first one is skipped by training."""
    with Recorder("train_short", stage(steps=8), run, tracking) as recorder:
        for step in steps:
            recorder.show(row(step, loss=NAN if step == 1 else loss, skipped=1))


# --- what is tracked, and what is refused ----------------------------------------------------------------------------


def test_the_names_of_what_is_tracked():
    values = scalars(row(3, budget="small", memory_bytes=3 * 2**30) | {"tokens_per_second": 7.0})
    numbers = {"train/loss/small": 2.0, "train/kl/small": 0.5, "train/budget_error/small": 0.013}
    rest = {"tokens_per_second": 7.0, "learning_rate": 1e-3, "grad_norm": 0.7, "skipped": 0, "memory_gib": 3.0}
    assert values == numbers | rest
    matched = {"step": 1, "tokens": 40, "budgets": {"small": {"loss": 2.0, "state": 0.25}}}
    assert scalars(matched) == {"train/loss/small": 2.0, "train/state/small": 0.25}
    assert scalars({"step": 1, "tokens": 40, "budgets": {"full": {"loss": None}}, "grad_norm": None}) == {}


def test_off_by_default():
    assert Tracking() == load(ROOT / "params.yaml").tracking
    assert Tracking().tensorboard is None and Tracking().wandb is None


def test_no_stage_depends_on_it():
    """Switching it on makes nothing run again, so a trained family is not lost by looking at it."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()
    assert not [name for entry in stages for name in entry.get("do", entry).get("params", ()) if "tracking" in name]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"tensorbord": "a"}, r"tracking\.tensorbord: unknown parameter; did you mean 'tensorboard'\?"),
        ({"tensorboard": True}, r"tracking\.tensorboard: got True; allowed: a string"),
        ({"tensorboard": " "}, r"tracking\.tensorboard: got ' '; allowed: a directory"),
        ({"tensorboard": __file__}, r"tracking\.tensorboard: got '.*'; allowed: a directory, not a file"),
        ({"wandb": ""}, r"tracking\.wandb: got ''; allowed: a project name"),
        ({"wandb": "me/project"}, r"tracking\.wandb: got 'me/project'; allowed: a project name of up to 128"),
        ({"wandb_mode": "off"}, r"tracking\.wandb_mode: got 'off'; allowed: 'online', 'offline'"),
    ],
)
def test_bad_values_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        config.load(Tracking, values, "params.yaml: tracking")


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_any_work(run, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # Python's own way of saying that it is not there
    words = rf"tracking\.{package}: got 'here'; allowed: null, because the package {package} is not installed .*\.\[tr"
    values = yaml.safe_load((ROOT / "params.yaml").read_text()) | {"tracking": {package: "here"}}
    values["cost"]["table"] = str(ROOT / values["cost"]["table"])
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit, match=r"^error: params\.yaml: " + words):
        check_parameters()
    with (
        pytest.raises(ConfigError, match=words.removeprefix(r"tracking\.")),
        Recorder("s", stage(), run, Tracking(**{package: "here"})),
    ):
        raise AssertionError("it started")
    assert not run.exists()


def test_a_directory_of_logs_is_no_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "logs_of_mine").mkdir()
    assert not is_installed("logs_of_mine") and is_installed("json")


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_reads_every_step_once(run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracking = Tracking(tensorboard=str(tmp_path / "boards"))
    record(run, tracking, range(1, 7), loss=9.0)
    record(run, tracking, range(5, 9), loss=1.0)  # from the checkpoint of step 4
    directory = tmp_path / "boards" / KEY
    assert len(list(directory.glob("events.out.tfevents.*"))) == 2
    events = EventAccumulator(str(directory))
    events.Reload()
    names = {"learning_rate", "grad_norm", "skipped", "memory_gib", "tokens_per_second"}
    assert set(events.Tags()["scalars"]) == names | {
        *("train/loss/full", "train/kl/full", "train/budget_error/full"),
    }
    losses = [(event.step, event.value) for event in events.Scalars("train/loss/full")]
    assert losses == [(80, 9.0), (120, 9.0), (160, 9.0), (200, 1.0), (240, 1.0), (280, 1.0), (320, 1.0)]
    assert [event.step for event in events.Scalars("grad_norm")] == [40 * step for step in range(1, 9)]
    assert events.Scalars("memory_gib")[0].value == 3.0
    assert all(math.isfinite(event.value) for name in events.Tags()["scalars"] for event in events.Scalars(name))


# --- Weights & Biases ------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """The library, with no account, no settings and no files but in the test's own directory."""
    library = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)  # it asks for a key where somebody could answer
        yield library
    library.teardown()


def wandb_records(path: Path) -> list:
    """The records of a run's file: LevelDB's log format (crc, length, kind; 32 KiB blocks) after seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts, records = path.read_bytes(), 7, [], []
    while position + 7 <= len(data):
        rest = 32768 - position % 32768
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if rest < 7 or kind == 0:  # padding to the end of the block
            position += rest
            continue
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(b"".join(parts)))
            parts = []
    return records


def history(records: list) -> list[dict]:
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items} for items in rows]


def test_wandb_offline_goes_on_under_the_same_id(run, wandb):
    tracking = Tracking(wandb="elastic", wandb_mode="offline")
    record(run, tracking, range(1, 4))
    time.sleep(1)  # its directories are named by the second
    record(run, tracking, range(3, 5), loss=1.0)
    wandb.teardown()  # its service may write the end of a file after the run's own end, and always before its own
    first, second = sorted((run.parent / "wandb").glob("offline-run-*/*.wandb"))
    for path in (first, second):
        records = wandb_records(path)
        (started,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        assert (started.run_id, started.project, started.display_name) == (KEY, "elastic", KEY)
        configuration = {item.key: item.value_json for item in started.config.update}
        assert configuration["name"] == '"train_short"' and configuration["batch_size"] == "4"
        metrics = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
        assert {(metric.name or metric.glob_name, metric.step_metric) for metric in metrics} >= {("*", "tokens")}
        assert [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"] == [0]
    before, after = history(wandb_records(first)), history(wandb_records(second))
    losses = [(row["_step"], row["tokens"], row.get("train/loss/full")) for row in before]
    assert losses == [(1, 40, None), (2, 80, 2.0), (3, 120, 2.0)]
    assert before[0]["grad_norm"] == 0.7 and before[0]["skipped"] == 1 and before[0]["memory_gib"] == 3
    assert [(row["_step"], row["tokens"], row["train/loss/full"]) for row in after] == [(3, 120, 1.0), (4, 160, 1.0)]


def test_a_run_that_broke_off_is_told_to_wandb(run, wandb):
    with (
        pytest.raises(FloatingPointError),
        Recorder("s", stage(), run, Tracking(wandb="elastic", wandb_mode="offline")) as recorder,
    ):
        recorder.show(row(1))
        raise FloatingPointError
    wandb.teardown()
    (path,) = (run.parent / "wandb").glob("offline-run-*/*.wandb")
    codes = [r.exit.exit_code for r in wandb_records(path) if r.WhichOneof("record_type") == "exit"]
    assert codes == [1] and len(history(wandb_records(path))) == 1


def test_wandb_without_an_account_says_what_to_do(run, wandb):
    words = r"tracking\.wandb: 'elastic' could not be started: .*wandb login.* Or set tracking\.wandb_mode to offline"
    with (
        pytest.raises(ConfigError, match=words),
        Recorder("s", stage(), run, Tracking(wandb="elastic")),
    ):
        raise AssertionError("it started")


def test_wandb_can_be_switched_off_by_its_own_variable(run, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    record(run, Tracking(wandb="elastic"), range(1, 4))
    assert not (run.parent / "wandb").exists()
