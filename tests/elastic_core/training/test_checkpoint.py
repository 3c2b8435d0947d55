"""Checkpoints: whole or not at all, verified, keyed by what decides a run; killed, damaged and out of space."""

import itertools
import json
import logging
import os
import re
import subprocess
import threading

import pytest
import torch

from elastic_core.io import storage
from elastic_core.io.fingerprints import file_digest
from elastic_core.training import checkpoint
from elastic_core.training.checkpoint import CheckpointError, Checkpoints
from elastic_core.training.loop import train
from tests.support.runs import assert_same, routed_run, rows_without_time

pytestmark = pytest.mark.usefixtures("little_text")
TENSORS = {"weight": torch.arange(600.0).view(20, 30), "step": torch.tensor(3.0)}


def save(directory, step, keep=2, tensors=TENSORS):
    checkpoints = Checkpoints(directory, keep)
    checkpoints.save(step, tensors, {"step": step})
    checkpoints.wait()


def load(directory):
    """The newest one's progress, and its tensors read into zeros."""
    tensors = {name: torch.zeros_like(value) for name, value in TENSORS.items()}
    return Checkpoints(directory).load_newest(tensors), tensors


def damage(path, kind):
    shard = next(path.glob("__*.distcp"))
    content = bytearray(shard.read_bytes())
    if kind == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    elif kind == "bit flipped":
        content[len(content) // 2] ^= 4
        shard.write_bytes(content)
    elif kind == "no manifest":
        (path / "manifest.json").unlink()
    elif kind == "empty manifest":
        (path / "manifest.json").write_text("")
    elif kind == "another manifest":
        text = (path / "manifest.json").read_text()
        (path / "manifest.json").write_text(re.sub(r'"step": (\d+)', r'"step": 1\1', text, count=1))
    elif kind == "no metadata":
        (path / ".metadata").unlink()
    elif kind == "no shard":
        shard.unlink()


KINDS = ("truncated", "bit flipped", "no manifest", "empty manifest", "another manifest", "no metadata", "no shard")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_passed_over_and_replaced(tmp_path, caplog, kind):
    save(tmp_path, 3)
    save(tmp_path, 6, tensors={name: value + 1 for name, value in TENSORS.items()})
    damage(tmp_path / "step-00000006", kind)
    with caplog.at_level(logging.WARNING):
        progress, tensors = load(tmp_path)
    assert re.search(r"checkpoint .*step-00000006 is damaged \(.+\); trying the one before", caplog.text)
    assert progress == {"step": 3}
    assert_same(tensors, TENSORS)
    save(tmp_path, 6)
    assert load(tmp_path)[0] == {"step": 6}
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000003", "step-00000006"]


@pytest.mark.parametrize("kind", ["truncated", "no manifest"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(data, straight, tmp_path, kind):
    list(itertools.islice(train(routed_run(data, tmp_path)), 7))
    damage(tmp_path / "step-00000006", kind)
    run = routed_run(data, tmp_path)
    assert rows_without_time(train(run)) == straight[1][3:]
    assert_same(run.model.state_dict(), straight[0].model.state_dict())
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000009", "step-00000012"]


def test_only_damaged_checkpoints_are_none(tmp_path):
    assert load(tmp_path / "nowhere")[0] is None
    save(tmp_path, 3)
    damage(tmp_path / "step-00000003", "truncated")
    progress, tensors = load(tmp_path)
    assert progress is None and not any(value.any() for value in tensors.values())


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_few_checkpoints_are_kept(tmp_path, keep):
    for step in range(5, 30, 5):
        save(tmp_path, step, keep)
        steps = [json.loads((p / "manifest.json").read_text())["step"] for p in sorted(tmp_path.glob("step-*"))]
        assert steps == list(range(5, step + 5, 5))[-keep:]
    progress, tensors = load(tmp_path)
    assert progress == {"step": 25}
    assert_same(tensors, TENSORS)
    assert {p.name for p in tmp_path.iterdir()} == {f"step-{step:08d}" for step in steps}  # nothing else is left


def test_a_manifest_lists_every_file_and_its_sum(tmp_path):
    save(tmp_path, 3)
    directory = tmp_path / "step-00000003"
    files = json.loads((directory / "manifest.json").read_text())["files"]
    assert {p.name for p in directory.iterdir()} == {*files, "manifest.json"}
    for name, entry in files.items():
        assert entry == {"bytes": (directory / name).stat().st_size, "sha256": file_digest(directory / name)}


def test_a_save_that_dies_leaves_the_checkpoint_before_and_says_so(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def dies(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "file_digest", dies)
    with pytest.raises(
        CheckpointError, match=r"the checkpoint of step 2 could not be written to .*No space left on device.*resume"
    ):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert load(tmp_path)[0] == {"step": 1} and [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    save(tmp_path, 2)
    assert load(tmp_path)[0] == {"step": 2}


def test_what_a_killed_save_left_is_cleared_away(tmp_path):
    save(tmp_path, 1)
    for name in (".step-00000002.partial", ".step-00000000.dropped"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_text("half")
    assert load(tmp_path)[0] == {"step": 1}
    save(tmp_path, 3)
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000001", "step-00000003"}


def test_saving_goes_on_while_tensors_change(tmp_path, monkeypatch):
    """What is written is what the tensors were; the next save waits for it."""
    hold, digest = threading.Event(), checkpoint.file_digest

    def slow(path):
        hold.wait(60)
        return digest(path)

    monkeypatch.setattr(checkpoint, "file_digest", slow)
    weight = torch.ones(4, 5)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"weight": weight}, {"step": 1})
    assert not list(tmp_path.glob("step-*"))  # save has returned, the checkpoint is not there yet
    weight.zero_()
    hold.set()
    checkpoints.wait()
    found = {"weight": torch.zeros(4, 5)}
    assert Checkpoints(tmp_path).load_newest(found) == {"step": 1} and (found["weight"] == 1).all()


def test_a_full_disk_ends_the_run_and_space_lets_it_go_on(data, straight, tmp_path):
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        size = sum(p.stat().st_size for p in straight[0].checkpoints.rglob("*") if p.is_file()) // 2  # of two
        subprocess.run(["mount", "-o", f"remount,size={int(1.5 * size)}", tmp_path], check=True)
        run = routed_run(data, tmp_path)
        with pytest.raises(CheckpointError, match=r"step 6 could not be written to .*space.*make space, for instance"):
            list(train(run))
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]
        subprocess.run(["mount", "-o", f"remount,size={4 * size}", tmp_path], check=True)
        again = routed_run(data, tmp_path)
        assert rows_without_time(train(again)) == straight[1][3:]
        assert_same(again.model.state_dict(), straight[0].model.state_dict())
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


# Under a URL


def test_checkpoints_on_s3_are_whole_verified_and_few(s3, caplog):
    place = storage.join(s3.place, "run")
    assert load(place)[0] is None
    for step in (1, 2, 3):
        save(place, step)
    progress, tensors = load(place)
    assert progress == {"step": 3}
    assert_same(tensors, TENSORS)
    assert sorted(checkpoint._names(place)) == ["step-00000002", "step-00000003"]
    shard = storage.join(place, "step-00000003", "__0_0.distcp")
    content = bytearray(storage.read_bytes(shard))
    content[len(content) // 2] ^= 4
    storage.write_bytes(shard, bytes(content))
    with caplog.at_level(logging.WARNING):
        assert load(place)[0] == {"step": 2}
    assert "step-00000003 is damaged (the checksum of __0_0.distcp does not match)" in caplog.text
    storage.remove(storage.join(place, "step-00000002", "manifest.json"))  # one that was never finished
    assert load(place)[0] is None
    save(place, 2)
    assert load(place)[0] == {"step": 2} and checkpoint._names(place) == ["step-00000002"]
    assert not list(checkpoint._staging_directory(place, "save").parent.glob("*/*"))  # nothing stays on the local disk


def test_a_run_with_checkpoints_on_s3_survives_the_server_and_its_own_death(s3, data, straight, tmp_path):
    """The server is away while a checkpoint is written, and when the run is killed and started again."""
    place = storage.join(s3.place, "run")
    rows = train(routed_run(data, place))
    for _ in range(4):
        next(rows)
    back = threading.Timer(1, s3.restart)
    s3.kill()
    back.start()
    for _ in range(4):
        next(rows)  # step 6 is saved meanwhile; step 9 would wait for it
    rows.close()
    back.join()
    again = routed_run(data, place)
    assert rows_without_time(train(again)) == straight[1][6:]
    assert_same(again.model.state_dict(), straight[0].model.state_dict())


@pytest.mark.parametrize(
    ("error", "kind"),
    [(storage.StorageError, CheckpointError), (storage.StorageUnavailable, checkpoint.CheckpointUnavailable)],
)
def test_a_newest_checkpoint_that_cannot_be_read_is_no_reason_to_take_an_older_one(s3, monkeypatch, error, kind):
    place = storage.join(s3.place, "run")
    for step in (1, 2):
        save(place, step)

    def away(*arguments):
        raise error(f"{arguments[0]}: no answer")

    monkeypatch.setattr(checkpoint.storage, "download", away)
    with pytest.raises(CheckpointError, match=r"step-00000002 could not be read: .*no answer") as caught:
        load(place)
    assert type(caught.value) is kind
    monkeypatch.setattr(checkpoint.storage, "upload", away)  # whether it may be tried again is known of a save too
    with pytest.raises(CheckpointError, match=r"step 3 could not be written to .*no answer") as caught:
        save(place, 3)
    assert type(caught.value) is kind
