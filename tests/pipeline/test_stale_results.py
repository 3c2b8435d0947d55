"""What has changed runs again, and from the start: code, inputs, --force; what was interrupted goes on."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("dvc")
pytest.importorskip("ray")

from elastic_core.io.fingerprints import DigestCache
from elastic_core.io.provenance_file import read_provenance
from tasks import fingerprint
from tasks.settings.load import load
from tests.support.flows_fixture.driver import copy_checkout
from tests.support.pipeline.tiny_pipeline import write_params

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.thorough, pytest.mark.timeout(600)]
# Stages that can go on from what an earlier start has left, and a statement of their work.
TRAINING = ("elastic_core/training/loop.py", "    stage, modules = run.stage, trained_modules(run)\n")
WORK = {
    "prepare_data": ("tasks/corpora/encoding.py", "        split, texts = batch\n"),
    "parent": TRAINING,
    "rank": ("elastic_core/search/importance/depth.py", "        total = total + ((part @ gram) * part).sum()\n"),
    "train_short": TRAINING,
    "train_extended": TRAINING,
}
FIRST = ("fingerprint", *WORK)
FIRST_RUN = f"from tasks import {', '.join(FIRST)}\nfor stage in ({', '.join(FIRST)}): stage.main()"
# Each stage once more, as far as its changed code: what a stage is asked for is in the arguments of the process.
CHANGED_RUN = f"""
import sys
from tasks import {", ".join(WORK)}
for stage in ({", ".join(WORK)}):
    sys.argv[1:] = [stage.__name__]
    try:
        stage.main()
    except RuntimeError as error:
        print(error)
"""
RAISE = "raise RuntimeError('the changed code ran in ' + __import__('sys').argv[1])"


class Checkout:
    """A checkout with a tiny pipeline; `dvc` runs DVC in it."""

    def __init__(self, directory: Path):
        self.directory = copy_checkout(ROOT, directory)

    def python(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **variables}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=self.directory, env=environment, capture_output=True, text=True)

    def dvc(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        return self.python("-m", "dvc", *arguments, **variables)

    def record(self, stage: str) -> dict:
        """The provenance of a stage's newest result."""
        written = self.directory / "artifacts" / "provenance" / f"{stage}.json"
        if not written.is_file():
            records = read_provenance(self.directory / "artifacts" / stage / "model")
            return next(record for record in records if record["stage"] == stage)
        return json.loads(written.read_text())

    def change(self, stage: str, new: str) -> Callable[[], int]:
        """Put `new` before a statement of the stage's work; returns what restores the file."""
        name, statement = WORK[stage]
        path, text = self.directory / name, (self.directory / name).read_text()
        assert text.count(statement) == 1
        indent = " " * (len(statement) - len(statement.lstrip()))
        path.write_text(text.replace(statement, f"{indent}{new}\n{statement}"))
        return lambda: path.write_text(text)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """All stages until train_extended have run, in one process, and DVC has their results."""
    directory = tmp_path_factory.mktemp("stale")
    checkout = Checkout(directory / "checkout")
    place = directory / "place"
    (place / "corpus").mkdir(parents=True)
    for number in range(2):
        write_corpus(place / "corpus" / f"{number}.jsonl", number)
    short = {"steps": 6, "checkpoint_every": 2, "warmup_steps": 2}
    write_params(checkout.directory, place, train_short=short, train_extended=short, extract={"destination": None})
    checkout.place = place
    for done in (checkout.python("-c", FIRST_RUN), checkout.dvc("commit", "--force", *FIRST)):
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return checkout


def write_corpus(path: Path, seed: int) -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [{"text": " ".join(words[(i * j + seed) % 10] for j in range(3, 60))} for i in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_nothing_runs_again_and_no_checkpoint_is_left_without_a_change(checkout):
    done = checkout.dvc("repro", "train_extended")
    assert done.returncode == 0 and done.stdout.count("Running stage") == 1  # the fingerprints
    left = [path.name for path in (checkout.directory / "checkpoints").iterdir()]
    assert left == ["digests.json"]


def test_changed_code_runs_and_does_not_only_give_the_old_result(checkout):
    """A stage's old result is there, and so is DVC's record of it. That DVC starts the stage: test_dvc_graph.py."""
    restored = [checkout.change(stage, RAISE) for stage in ("prepare_data", "parent", "rank")]  # all training is alike
    try:
        done = checkout.python("-c", CHANGED_RUN)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("the changed code ran")]
        assert lines == [f"the changed code ran in tasks.{stage}" for stage in WORK]
    finally:
        for restore in restored:
            restore()


def test_changed_inputs_are_seen(checkout):
    """An edited file and another file, a removed one: the data is prepared anew."""
    corpus = checkout.place / "corpus"

    def recorded() -> dict:
        return checkout.record("prepare_data")["fingerprints"]["corpora"]["mine"]["path"]

    def found() -> dict:
        with contextlib.chdir(checkout.directory):
            return fingerprint.corpora(load(), DigestCache(fingerprint.CACHE))["mine"]["path"]

    def prepared() -> dict:
        done = checkout.dvc("repro", "prepare_data")
        assert done.returncode == 0, done.stderr
        assert recorded() == found()
        return recorded()

    seen = [recorded()]
    write_corpus(corpus / "0.jsonl", 7)
    seen.append(found())
    write_corpus(corpus / "2.jsonl", 2)
    seen.append(prepared())
    assert [entry["files"] for entry in seen] == [2, 2, 3] and len({entry["sha256"] for entry in seen}) == 3
    (corpus / "2.jsonl").unlink()
    write_corpus(corpus / "0.jsonl", 0)
    assert prepared() == seen[0]


def test_force_starts_from_the_start_and_without_it_an_interrupted_stage_goes_on(checkout):
    restore = checkout.change(
        "train_short", 'if run.step == 4 and "STOP" in __import__("os").environ: raise SystemExit(9)'
    )

    def interrupted() -> dict:
        """The run, stopped after its fourth step."""
        assert checkout.dvc("repro", "--single-item", "train_short", STOP="1").returncode != 0
        (path,) = (checkout.place / "checkpoints").glob("train_short-*/step-*4")
        return json.loads((checkout.directory / "checkpoints" / path.parent.name / "run.json").read_text())

    try:
        first = interrupted()
        assert checkout.dvc("repro", "--single-item", "train_short").returncode == 0
        assert checkout.record("train_short")["started"] == first["started"]
        checkout.change("train_short", "# so that it runs again")
        second = interrupted()
        assert checkout.dvc("repro", "--single-item", "--force", "train_short").returncode == 0
        forced = checkout.record("train_short")
        assert forced["key"] == second["key"] and forced["started"] > second["started"]
    finally:
        restore()
    assert checkout.dvc("repro", "--single-item", "train_short").returncode == 0  # from DVC's cache


def test_an_old_run_goes_on_under_new_code_where_that_is_asked_for(checkout):
    """And only then; it is on record."""
    kill = (
        "if run.step == 4: __import__('time').sleep(1) or __import__('os')._exit(9)"  # its lease stays, as after a kill
    )
    restore = checkout.change("train_extended", kill)
    try:
        assert checkout.dvc("repro", "--single-item", "train_extended").returncode != 0
    finally:
        restore()
    (old,) = {path.parent.name for path in (checkout.place / "checkpoints").glob("train_extended-*/step-*")}
    assert list((checkout.place / "checkpoints" / old).glob("lease-*"))
    checkout.change("train_extended", "# another comment")
    wrong = checkout.dvc("repro", "--single-item", "train_extended", ELASTIC_CONTINUE="train_extended-nothing")
    assert "allowed: a run of this stage that has not ended (" in wrong.stderr and old in wrong.stderr
    done = checkout.dvc("repro", "--single-item", "train_extended", ELASTIC_CONTINUE=old)
    assert done.returncode == 0, done.stderr
    record = checkout.record("train_extended")
    assert record["continues"]["run"] == old and record["continues"]["changed"] == ["elastic_core/training"]
    assert record["steps"] == 6 and not list((checkout.place / "checkpoints" / old).glob("step-*"))
    assert not (checkout.directory / "checkpoints" / old).exists()
