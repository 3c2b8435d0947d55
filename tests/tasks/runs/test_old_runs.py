"""Which runs nobody needs any more, and what `elastic clean` shows and removes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("dvc")

from elastic_core.errors import UserError
from tasks.commands.clean import find_left, select
from tasks.runs import lock
from tasks.runs.job import started
from tasks.runs.key import read_inputs
from tasks.runs.old_runs import find_runs, remove_finished

STAGE = {"cmd": "cp input made", "deps": ["input"], "outs": ["made"], "params": ["rate"]}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A DVC workspace with one stage, which has not run."""
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], check=True)
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"make": STAGE}}))
    Path("params.yaml").write_text("rate: 1\n")
    Path("input").write_text("words")
    return tmp_path


def begin(rate: int, age: float, words: str = "words") -> str:
    """A run of the stage with this parameter and input, which last wrote so many seconds ago; its directory's name."""
    Path("params.yaml").write_text(f"rate: {rate}\n")
    Path("input").write_text(words)
    with started("make") as job:
        (job.directory / "progress").write_text("half")
    when = job.directory.stat().st_mtime - age
    for path in (job.directory, *job.directory.rglob("*")):
        os.utime(path, (when, when))
    return job.directory.name


def repro():
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], check=True)


def left() -> set[str]:
    return {run.directory.name for run in find_runs()}


def test_a_finished_run_and_older_ones_are_removed_once_dvc_has_the_results(workspace, capsys):
    older = {begin(2, age=20 + number, words=f"{number}") for number in range(4)}
    other = begin(1, age=20)
    finished = begin(2, age=10)
    assert not remove_finished() and left() == {*older, other, finished}  # DVC has nothing yet
    repro()
    newer = begin(2, age=0, words="newer")
    assert {run.directory.name for run in remove_finished()} == {*older, finished}
    assert left() == {other, newer}  # with another parameter; or begun after the finished one: they may go on
    assert not remove_finished()
    said = capsys.readouterr().out.splitlines()
    assert sorted(said) == sorted(f"checkpoints/{n}: removed, because a newer run of make has finished" for n in older)


def test_a_run_that_a_process_works_on_stays(workspace):
    finished = begin(2, age=10)
    repro()
    with lock.only_one(f"checkpoints/{finished}", "make"):
        assert not remove_finished() and left() == {finished}
        (found,) = find_left(workspace)
        with pytest.raises(UserError, match=rf"{finished}: process {os.getpid()} of .* works on it; stop it first"):
            found.remove()


def test_the_same_run_goes_on_and_a_forced_one_starts_from_the_start(workspace, monkeypatch):
    name = begin(1, age=0)
    first = json.loads(Path("checkpoints", name, "run.json").read_text())
    with started("make") as job:
        assert (job.directory / "progress").read_text() == "half"
        assert job.record["started"] == first["started"] and job.key == read_inputs("make").key
    monkeypatch.setenv("ELASTIC_FROM_THE_START", "1")
    with started("make") as job:
        assert not (job.directory / "progress").exists()


def test_what_is_left_is_shown_and_removed(workspace):
    run = begin(1, age=0)
    (workspace / "checkpoints" / "make-old").mkdir()  # of an older version: does not say what it is
    (workspace / "checkpoints" / "make-old" / "step").write_bytes(b"x" * 10_000)
    (workspace / ".runs" / "smoke").mkdir(parents=True)
    (workspace / ".runs" / "smoke" / "params.yaml").write_text("rate: 1\n")
    found = {item.name: item for item in find_left(workspace)}
    kinds = {name: item.kind for name, item in found.items()}
    assert kinds == {"checkpoints/make-old": "files", f"checkpoints/{run}": "run", ".runs/smoke": "workspace"}
    assert next(iter(found)) == "checkpoints/make-old"  # the largest comes first
    assert found[f"checkpoints/{run}"].num_bytes == sum(
        path.stat().st_size for path in Path("checkpoints", run).iterdir()
    )
    with pytest.raises(UserError, match=r"elastic clean: got 'nothing'; allowed: \.runs/smoke, checkpoints/make-"):
        select(found.values(), ["nothing"])
    for item in select(found.values(), [".runs/smoke", f"checkpoints/{run}"]):
        item.remove()
    assert [item.name for item in find_left(workspace)] == ["checkpoints/make-old"]
