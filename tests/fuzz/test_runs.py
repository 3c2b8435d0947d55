"""Broken files of runs and of their progress: left out, taken over, or refused by one message that names the file."""

import json
import os
import shutil

import psutil
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic_core import Submodel, rank, sort_
from elastic_core.cost.latency_table import Table
from elastic_core.errors import UserError
from elastic_core.io.fingerprints import DigestCache
from elastic_core.search.importance.ranking import Ranking
from elastic_core.search.importance.state import DEPTH, WIDTHS, RankingState
from flows import differences, records
from tasks.progress.metrics_file import NewRows, drop_cut_off_line, read_rows
from tasks.runs import lock, provenance
from tasks.runs.old_runs import find_runs
from tests.support.fuzzing import directories
from tests.support.fuzzing.broken import broken_bytes, broken_file, broken_json, broken_tensors, json_values
from tests.support.fuzzing.calls import call, examples
from tests.support.models.parents import random_elastic
from tests.support.oracles.latencies import make_table

RECORD = {
    **{"checkpoints": "checkpoints/rank-0123", "stage": "rank", "key": "0123", "commit": None, "clean": False},
    **{"started": "2026-11-29T20:00:00+00:00", "parameters": {"seed": 0}, "libraries": {}, "files": {"a": "b"}},
}
ROWS = [
    {"step": step, "mode": "soft", "tokens": 9, "seconds": 0.5, "budgets": {"full": {"loss": 3.0, "kl": None}}}
    for step in (1, 2, 2)
]
RANKING = {
    **{"depth": [1, 0], "depth_scores": {"0": 0.5, "1": 0.25}},
    **{"scores": {"hidden": [0.5, 1.0]}, "orders": {"hidden": [1, 0]}},
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@examples(16)
@given(content=broken_file(RECORD))
def test_run_json(scratch, content):
    file = scratch / "workspace" / "checkpoints" / "rank-0123" / "run.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)

    def look():
        for run in find_runs(scratch / "workspace"):
            assert (run.last_used, run.num_bytes, run.holder)[2] is None

    call("run.json", scratch, look, "run.json")


def lease(**changes) -> dict:
    own = {"id": "0123456789abcdef", "process": os.getpid(), "started": psutil.Process().create_time(), "host": "here"}
    return {**own, "machine": lock._machine(), "beats": 3, **changes}


@examples(16)
@given(data=st.data())
def test_lease(scratch, data):
    """A lease that no process can have written is not held for ever."""
    directory = scratch / "leases"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    file = directory / "lease-00000001.json"
    valid = data.draw(st.sampled_from([lease(), lease(process=2**22 - 1), lease(machine="another")]))
    file.write_bytes(data.draw(broken_file(valid)))
    with pytest.MonkeyPatch.context() as patch:
        for name, seconds in (("HEARTBEAT_SECONDS", 0.01), ("EXPIRE_SECONDS", 0.05), ("LOOK_SECONDS", 0.01)):
            patch.setattr(lock, name, seconds)
        call("lease: holder", scratch, lambda: lock.holder_of(directory))
        end = call("lease: take", scratch, lambda: take(directory))
    assert isinstance(end, (lock.Lease, str))


def take(directory):
    try:
        return lock.take(directory)
    except lock.Held as error:
        return error.holder


@examples(16)
@given(content=broken_bytes(["".join(json.dumps(row) + "\n" for row in ROWS).encode()]), rows=broken_json(ROWS))
def test_metrics(scratch, content, rows):
    path = scratch / "metrics.jsonl"
    lines = [json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows])]
    for text in (content, "".join(lines).encode()):
        path.write_bytes(text)
        call("metrics: new rows", scratch, lambda: NewRows(path).read(), path)
        call("metrics: all rows", scratch, lambda: read_rows(path), path)
        call("metrics: cut", scratch, lambda: drop_cut_off_line(path), path)


@examples(12)
@given(content=broken_file(RANKING))
def test_ranking(scratch, content):
    path = scratch / "ranking.json"
    path.write_bytes(content)
    call("ranking.json", scratch, lambda: Ranking.load(path), path)


def sort_by(path) -> None:
    """Read a ranking and sort a model by it, which then computes numbers."""
    config = directories.CONFIGS["llama"]()
    config.tie_word_embeddings = False
    model = sort_(random_elastic(0, config), Ranking.load(path))
    model(torch.arange(4)[None], Submodel(hidden_size=4))


@pytest.fixture(scope="module")
def rotation(scratch):
    """The ranking of the same model, with a basis and norm ratios in the file beside it."""
    path = scratch / "rotation" / "ranking.json"
    config = directories.CONFIGS["llama"]()
    ranking = rank(random_elastic(0, config), [torch.arange(8)[None]], depth_method="one_shot_nmse")
    ranking.save(path)
    assert call("valid", scratch, lambda: sort_by(path)) is None
    return path


@examples(16)
@given(data=st.data())
def test_the_tensors_of_a_ranking(scratch, rotation, data):
    file = data.draw(st.sampled_from([rotation, rotation.with_suffix(".safetensors")]))
    with directories.restored(file):
        valid = file.read_bytes()
        file.unlink()  # an earlier call may have mapped it
        kind = broken_file(json.loads(valid)) if file == rotation else broken_tensors(valid)
        file.write_bytes(data.draw(kind))
        call("ranking.safetensors", scratch, lambda: sort_by(rotation), rotation.with_suffix(""), "ranking:")


def test_tensors_of_rankings_that_were_found(scratch, rotation):
    file = rotation.with_suffix(".safetensors")
    tensors = safetensors.torch.load_file(file)
    name = next(name for name in tensors if name != "axes")
    with directories.restored(file):
        for change in (
            {"axes": tensors["axes"][0]},
            {"axes": tensors["axes"] * float("nan")},
            {"axes": tensors["axes"].long()},
            {name: tensors[name][1:]},
            {name: tensors[name] * float("inf")},
            {name: tensors[name].bool()},
        ):
            safetensors.torch.save_file(tensors | change, file)
            end = call("found", scratch, lambda: sort_by(rotation))
            assert isinstance(end, UserError), change
        file.unlink()
        end = call("found", scratch, lambda: sort_by(rotation), file)
        assert isinstance(end, UserError) and "is missing" in str(end)
    with directories.restored(rotation):
        for names in (["axes", name], ["axes", "x"], "axes", [3]):
            rotation.write_text(json.dumps(json.loads(rotation.read_text()) | {"tensors": names}))
            assert isinstance(call("found", scratch, lambda: sort_by(rotation)), UserError), names


@examples(12)
@given(data=st.data())
def test_unfinished_rankings(scratch, data):
    """What is damaged is computed again, and never loaded."""
    stored = {}
    RankingState(stored.get, stored.__setitem__).save_widths(3, {"hidden": torch.ones(4)}, {"hidden": 7})
    first = RankingState(stored.get, stored.__setitem__)
    first.begin_depth("a setting")
    first.once(lambda: {0: 0.5})
    valid = dict(stored)
    name = data.draw(st.sampled_from(sorted(stored)))
    stored[name] = data.draw(broken_bytes([stored[name]]))
    state = RankingState(stored.get)
    done, totals, _ = call("ranking state", scratch, state.load_widths)
    call("ranking state", scratch, lambda: state.begin_depth("a setting"))
    scores = call("ranking state", scratch, lambda: state.once(lambda: {0: 1.5}))
    assert done == 3 * (stored[WIDTHS] == valid[WIDTHS]) and (not done or torch.equal(totals["hidden"], torch.ones(4)))
    assert scores == ({0: 0.5} if stored[DEPTH] == valid[DEPTH] else {0: 1.5})


@examples(12)
@given(content=broken_file({"/a": [1, 2, 3, 4, "digest"]}))
def test_digests(scratch, content):
    path, file = scratch / "digests.json", scratch / "a.txt"
    file.write_text("text")
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError):
        entries = None
    if isinstance(entries, dict):
        entries[str(file)] = next(iter(entries.values()), None)
        content = json.dumps(entries).encode()
    path.write_bytes(content)

    def digest():
        cache = DigestCache(path)
        assert len(cache.digest(file, os.stat(file))) == 64
        cache.save()

    call("digests.json", scratch, digest, path)


@examples(12)
@given(content=broken_file(RECORD) | json_values.map(json.dumps).map(str.encode))
def test_records_of_stages(scratch, content):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(scratch)
        provenance.RECORDS.mkdir(parents=True, exist_ok=True)
        (provenance.RECORDS / "rank.json").write_bytes(content)
        call("records of stages", scratch, lambda: provenance.read_records("rank"), "rank.json")


FINISHED = {"name": "a", "id": "0", "profile": "default", "finished": "2026-11-29", "commit": "abc", "workspace": "/a"}
RESULTS = [{"model": "small", "loss": 2.0, "gap": None}]


@examples(16)
@given(data=st.data())
def test_finished_runs(scratch, data):
    """A damaged record does not stop the next run, and comparing names the file."""
    for name in ("a", "b"):
        directory = scratch / records.NAMED / name
        directory.mkdir(parents=True, exist_ok=True)
        files = {"run.json": FINISHED | {"name": name}, "results.json": RESULTS, "params.yaml": {"seed": 0}}
        for file, content in files.items():
            (directory / file).write_text(json.dumps(content))
    file = data.draw(st.sampled_from(sorted(files)))
    (directory / file).write_bytes(data.draw(broken_file(files[file])))
    call("finished runs", scratch, lambda: records.records(scratch))
    call("finished runs", scratch, lambda: records.kept_already(scratch, scratch), "nothing")
    call("finished runs", scratch, lambda: records.directory_of("b", "1", scratch / records.NAMED), "nothing")
    call("finished runs", scratch, lambda: differences.changes(directory.parent / "a", directory), directory)


@pytest.mark.parametrize("old, new", [(0, 10**400), (-(10**400), 0.5), (10**400, float("inf"))])
def test_changes_of_numbers_that_no_float_holds(scratch, old, new):
    for name, seed in (("a", old), ("b", new)):
        directory = scratch / records.NAMED / name
        directory.mkdir(parents=True, exist_ok=True)
        files = {"run.json": FINISHED | {"name": name}, "results.json": RESULTS, "params.yaml": {"seed": seed}}
        for file, content in files.items():
            (directory / file).write_text(json.dumps(content).replace("Infinity", ".inf"))
    (row,) = call("found", scratch, lambda: differences.changes(directory.parent / "a", directory))
    assert row["name"] == "seed" and row["change"] == "–"


@examples(24)
@given(data=st.data())
def test_latency_table(scratch, data):
    config = directories.CONFIGS["qwen3"]()
    path = scratch / "table.json"
    path.write_bytes(data.draw(broken_file(make_table(config).to_json())))

    def use():
        table = Table.load(path, f"{path}")
        sizes = {"hidden": config.hidden_size}
        return table.seconds(config, sizes, lambda layer: 1, 16)

    call("latency table", scratch, use, path, "cost.table")


@pytest.mark.parametrize(
    "content", ["null", "[]", "{}", '{"machine": 1}', "[" * 5000, json.dumps(lease(process=10**30))], ids=range(6)
)
def test_leases_that_were_found(scratch, content):
    """A damaged lease counts as one that is being written; a process that cannot exist does not hold anything."""
    directory = scratch / "leases"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    (directory / "lease-00000001.json").write_text(content)
    holder = call("found", scratch, lambda: lock.holder_of(directory))
    assert holder == (None if "process" in content else "a process that has just begun")


@pytest.mark.parametrize("line", ["null", "[1]", "{}", '{"step": "x"}', "\0\0", "{"])
def test_rows_that_were_found(scratch, line):
    """All rows have to be there for results; what shows progress leaves a damaged one out."""
    path = scratch / "metrics.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    end = call("found", scratch, lambda: read_rows(path), f"{path}, line 2")
    assert isinstance(end, UserError)
    assert call("found", scratch, lambda: NewRows(path).read())[0] == ROWS[0]


@pytest.mark.parametrize("content", [{}, {"depth": ["x"]}, RANKING | {"scores": {"a": [[1], [1, 2]]}}], ids=range(3))
def test_rankings_that_were_found(scratch, content):
    path = scratch / "ranking.json"
    path.write_text(json.dumps(content))
    assert isinstance(call("found", scratch, lambda: Ranking.load(path), path), UserError)


BAD_PLACES = (None, "", "/", ".", "checkpoints", "x" * 300 + "/rank-0123", "y/" * 3000 + "rank-0123")
BAD_PLACES += ("\ud800/rank-0123", "\0/rank-0123", "s3://bucket/another")


@pytest.mark.parametrize(
    "content",
    [{}, {**RECORD, "continues": {}}, *({**RECORD, "checkpoints": place} for place in BAD_PLACES)],
    ids=range(12),
)
def test_run_json_that_was_found(scratch, content):
    file = scratch / "workspace" / "checkpoints" / "rank-0123" / "run.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    assert isinstance(call("found", scratch, lambda: find_runs(scratch / "workspace"), file), UserError)
