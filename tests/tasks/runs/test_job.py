"""The files of a run that goes on from another one, or whose storage has changed: none is lost, whatever interrupts."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from elastic_core.config import ConfigError
from elastic_core.errors import UserError
from elastic_core.io import storage
from tasks.commands.clean import find_left
from tasks.runs import job as jobs
from tasks.runs import lock, old_runs
from tasks.runs.job import CONTINUE, started
from tasks.runs.key import Inputs

FILES = {"step-00000001/data": b"one", "step-00000001/manifest.json": b"{}", "step-00000002/data": b"two"}
PLACES = ("checkpoints", "elsewhere", "memory")
OTHERS = [("checkpoints", "memory"), ("memory", "checkpoints"), ("elsewhere", "memory"), ("checkpoints", "elsewhere")]


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs.provenance, "read_commit", lambda directory: (None, False))
    return tmp_path


def begin(monkeypatch, rate: int, kind: str, write: bool = False):
    """Start a run with this parameter and this kind of storage; its name and record."""
    monkeypatch.setattr(jobs, "read_inputs", lambda name: Inputs({"rate": rate}, {}, {}))
    place = f"memory://{Path().absolute()}" if kind == "memory" else kind
    settings = SimpleNamespace(compute=SimpleNamespace(storage=place))
    with started("train", settings) as job:
        for name, data in FILES.items() if write else ():
            storage.write_bytes(storage.join(job.checkpoints(settings), name), data)
        if write:
            job.metrics.write_text("rows")
    return SimpleNamespace(name=job.directory.name, place=job.checkpoints(settings), record=job.record, job=job)


def files_of(run) -> dict[str, bytes]:
    """The checkpoints of a run at its place, and its metrics."""
    names = [name for name in storage.versions(run.place) if name.startswith("step-")]
    found = {name: storage.read_bytes(storage.join(run.place, name)) for name in names}
    return found | ({"metrics": run.job.metrics.read_bytes()} if run.job.metrics.is_file() else {})


def interrupt(monkeypatch, at: int, after: bool) -> None:
    """Raise KeyboardInterrupt before or after the change number `at` of files."""
    done = []

    def counted(original):
        def change(*arguments):
            done.append(original)
            if len(done) == at + 1 and not after:
                raise KeyboardInterrupt
            original(*arguments)
            if len(done) == at + 1:
                raise KeyboardInterrupt

        return change

    for name in ("move", "write_text", "remove_files"):
        monkeypatch.setattr(jobs, name, counted(getattr(jobs, name)))


ALL = {**FILES, "metrics": b"rows"}


@pytest.mark.parametrize("old, new", [*OTHERS, ("checkpoints", "checkpoints")])
def test_a_take_over_that_is_interrupted_loses_nothing_and_is_on_record(monkeypatch, tmp_path, old, new):
    for at in range(12):
        first = begin(monkeypatch, 2 * at, old, write=True)
        with monkeypatch.context() as patch:
            patch.setenv(CONTINUE, first.name)
            interrupt(patch, at, after=at % 2 == 0)
            try:
                begin(patch, 2 * at + 1, new)
                ended = True
            except KeyboardInterrupt:
                ended = False
            plain = at % 3 > 0
        with monkeypatch.context() as patch:
            if not plain:
                patch.setenv(CONTINUE, first.name)
            second = begin(patch, 2 * at + 1, new)
        if "continues" in second.record:
            assert second.record["continues"]["run"] == first.name and "moves_from" not in second.record
            assert files_of(second) == ALL and not storage.versions(first.place)
            assert not [path for place in PLACES for path in Path(place, first.name).glob("*")]
        else:  # it had not begun to take over
            assert plain and not ended and not files_of(second) and files_of(first) == ALL
    assert ended  # there are no further changes that could be interrupted


@pytest.mark.parametrize("old, new", OTHERS)
def test_checkpoints_move_where_compute_storage_says(monkeypatch, capsys, old, new):
    for at in range(8):
        first = begin(monkeypatch, at, old, write=True)
        stale = SimpleNamespace(**vars(first) | {"place": begin_place(new, first.name)})
        storage.write_bytes(storage.join(stale.place, "step-00000001/data"), b"of a run that is not on record")
        with monkeypatch.context() as patch:
            interrupt(patch, at, after=at % 2 == 0)
            try:
                begin(patch, at, new)
                ended = True
            except KeyboardInterrupt:
                ended = False
        if at % 3 == 1:
            begin(monkeypatch, at, old)  # back
        second = begin(monkeypatch, at, new)
        said = capsys.readouterr().out
        assert not ended or f"storage has changed; its checkpoints moved from {first.place} to {second.place}" in said
        assert second.name == first.name and files_of(second) == ALL
        assert not [name for name in storage.versions(first.place) if name.startswith("step-")]
        (run,) = [run for run in old_runs.find_runs() if run.directory.name == first.name]
        assert run.places == (second.place,) and second.record["started"] == first.record["started"]
    assert ended


def begin_place(kind: str, name: str) -> str:
    return storage.join(f"memory://{Path().absolute()}" if kind == "memory" else kind, name)


def test_a_live_run_is_not_moved_and_not_removed_though_storage_has_changed(monkeypatch, workspace):
    run = begin(monkeypatch, 1, "elsewhere", write=True)
    (found,) = find_left(workspace)
    with lock.only_one(run.place, "train"):  # begun after `found`
        with pytest.raises(ConfigError, match="already runs"):
            begin(monkeypatch, 1, "memory")
        with pytest.raises(UserError, match=f"checkpoints/{run.name}: process .* works on it; stop it first"):
            found.remove()
    (workspace / "checkpoints" / "train-just-begun").mkdir()
    (files,) = [item for item in find_left(workspace) if item.kind == "files"]
    with lock.only_one(files.directory, "train"), pytest.raises(UserError, match=r"just-begun: process .* works on it"):
        files.remove()
    files.remove()
    assert files_of(run) == ALL and not files.directory.exists()
    moved = begin(monkeypatch, 1, "memory")
    with pytest.raises(UserError, match="a process that has moved its checkpoints works on it"):
        found.remove()
    assert files_of(moved) == ALL
    (found,) = find_left(workspace)
    found.remove()
    assert not storage.versions(moved.place) and not find_left(workspace) and not run.job.directory.exists()


def test_what_an_interrupted_move_has_left_is_removed(monkeypatch, workspace):
    """By `elastic clean`, and by a run from the start."""
    for rate in range(2):
        run = begin(monkeypatch, rate, "elsewhere", write=True)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, 1, after=True)  # the first of two checkpoints
            begin(patch, rate, "memory")
        assert storage.versions(run.place) and storage.versions(begin_place("memory", run.name))
        if rate:
            monkeypatch.setenv("ELASTIC_FROM_THE_START", "1")
            assert not files_of(begin(monkeypatch, rate, "memory"))
        else:
            (found,) = find_left(workspace)
            found.remove()
            assert not run.job.directory.exists()
        assert not storage.versions(run.place) and not storage.versions(begin_place("memory", run.name))


def test_a_run_is_removed_from_a_full_disk(monkeypatch, workspace):
    """A lease needs space too."""
    run = begin(monkeypatch, 1, "elsewhere", write=True)

    def full(location, data):
        raise storage.StorageError(f"{location}: cannot write it: No space left on device")

    (found,) = find_left(workspace)
    monkeypatch.setattr(storage, "create_bytes", full)
    found.remove()
    assert not storage.versions(run.place) and not find_left(workspace)


def test_checkpoints_that_cannot_be_reached_are_not_forgotten(monkeypatch):
    run = begin(monkeypatch, 1, "elsewhere", write=True)
    list_names = storage.list_names

    def refuse(location):
        if location == run.place:
            raise storage.StorageError(f"{location}: cannot list it: AccessDenied")
        return list_names(location)

    monkeypatch.setattr(storage, "list_names", refuse)
    for _ in range(2):
        with pytest.raises(
            UserError, match=rf"cannot move from {run.place} to .*: AccessDenied; .* remove checkpoints/"
        ):
            begin(monkeypatch, 1, "memory")
    monkeypatch.setattr(storage, "list_names", list_names)
    assert files_of(run) == ALL and files_of(begin(monkeypatch, 1, "memory")) == ALL
