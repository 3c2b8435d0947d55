"""A workspace is not rewritten while a run or a DVC process works in it."""

import contextlib
import json
import os
import subprocess
import sys
import types

import pytest
import yaml

from elastic_core.errors import UserError
from elastic_core.io import storage
from tasks.commands.clean import find_left
from tasks.runs import lock, workspace
from tasks.runs.workspace import holder_of, prepared
from tasks.settings.profiles import InUse, dvc_process, prepare_workspace
from tests.support.pipeline.checkout import write_checkout


@pytest.fixture
def root(tmp_path):
    """A checkout with one profile."""
    files = {
        "params.yaml": "seed: 0\n",
        "profiles/tiny.yaml": "seed: 1\n",
        "tasks/one.py": "one",
        ".gitignore": "/.runs/\n",
        ".dvc/config": "",
    }
    return write_checkout(tmp_path / "checkout", files)


def edit(root):
    (root / "profiles" / "tiny.yaml").write_text("seed: 2\n")
    (root / "tasks" / "one.py").write_text("another")


def content(copy):
    return yaml.safe_load((copy / "params.yaml").read_text())["seed"], (copy / "tasks" / "one.py").read_text()


def hold_by_dvc(copy, number):
    entry = {"pid": number, "cmd": "dvc repro"}
    (copy / ".dvc" / "tmp" / "rwlock").write_text(json.dumps({"write": {"a": entry}, "read": {"b": [entry]}}))


def test_a_stage_that_runs_keeps_its_code_and_parameters(root):
    copy = prepare_workspace("tiny", root)
    edit(root)
    hold_by_dvc(copy, os.getpid())
    with pytest.raises(
        InUse, match=rf"tiny: process {os.getpid()} runs a stage there; wait for it, or stop it .*remove {copy}/\.dvc"
    ):
        prepare_workspace("tiny", root)
    assert content(copy) == (1, "one")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    hold_by_dvc(copy, ended.pid)  # as a killed DVC leaves it
    assert content(prepare_workspace("tiny", root)) == (2, "another")


def test_locks_that_dvc_is_writing_are_read_again(root, monkeypatch):
    copy = prepare_workspace("tiny", root)
    path = copy / ".dvc" / "tmp" / "rwlock"
    path.write_text("")
    monkeypatch.setattr("tasks.settings.profiles.time.sleep", lambda seconds: hold_by_dvc(copy, os.getpid()))
    assert dvc_process(copy) == f"process {os.getpid()}"
    path.write_text('{"write"')
    monkeypatch.setattr("tasks.settings.profiles.time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match="rwlock"):
        dvc_process(copy)


def test_a_run_waits_for_the_run_and_the_dvc_in_its_workspace(root, monkeypatch):
    first, said, looks = contextlib.ExitStack(), [], []
    copy = first.enter_context(prepared("tiny", root, None, (), said.append))
    assert not said and holder_of(copy).startswith(f"process {os.getpid()} of ")
    (left,) = find_left(root)
    with pytest.raises(UserError, match=r"\.runs/tiny: process .* works on it; stop it first"):
        left.remove()

    def sleep(seconds):
        looks.append(seconds)
        assert content(copy) == (1, "one")
        if len(looks) == 2:
            first.close()
            hold_by_dvc(copy, os.getpid())
        if len(looks) == 4:
            (copy / ".dvc" / "tmp" / "rwlock").unlink()

    edit(root)
    monkeypatch.setattr(workspace, "time", types.SimpleNamespace(sleep=sleep))
    with prepared("tiny", root, None, (), said.append) as again:
        assert again == copy and content(copy) == (2, "another")
    assert looks == [workspace.BUSY_SECONDS] * 4 and "".join(said).count("Waiting until it is free …") == 2
    assert holder_of(copy) is None


def test_runs_of_other_workspaces_and_of_the_checkout_do_not_wait(root):
    with contextlib.ExitStack() as stack:
        directories = [
            stack.enter_context(prepared(profile, root, None, overrides, pytest.fail))
            for profile, overrides in (("default", ()), ("default", ()), ("tiny", ()), ("tiny", ["seed=3"]))
        ]
    assert directories[:2] == [root, root] and len(set(directories)) == 3
    assert not (root / ".dvc" / "tmp").exists()


def test_a_run_ends_only_if_another_one_has_taken_its_workspace(root, monkeypatch, capsys):
    """A process that was stopped for a while is told that its lease may be lost."""
    told = []

    @contextlib.contextmanager
    def kept(lease, on_lost):
        told.append(on_lost)
        yield

    monkeypatch.setattr(lock, "kept", kept)
    monkeypatch.setattr(workspace.os, "_exit", lambda status: told.append(status))
    with prepared("tiny", root, None, (), pytest.fail) as copy:
        told[0]("no sign of life could be written")
        assert told[1:] == []
        (file,) = (copy / workspace.LEASE).glob("lease-*")
        another = {**json.loads(file.read_text()), "id": "another"}
        storage.write_bytes(file.with_name("lease-00000002.json"), json.dumps(another).encode())
        told[0]("process 1 of there has taken over")
    assert told[1:] == [os.EX_TEMPFAIL] and "process 1 of there has taken over" in capsys.readouterr().err
