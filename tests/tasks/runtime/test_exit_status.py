"""How stages end: with a text, no traceback, and a status that tells whether trying again may help."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_core.config import ConfigError
from elastic_core.data.loader import TokenData
from elastic_core.io.storage import StorageError, StorageUnavailable
from tasks.runtime.exit_status import StageError, StageInterrupted, errors_as_text
from tests.support.committed_params import write
from tests.support.pipeline.dvc_workspace import make_workspace
from tests.support.pipeline.stages import run_stage

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("error", [StageInterrupted("workers were lost"), StorageUnavailable("s3://a: no answer")])
def test_what_trying_again_may_mend_has_a_status_of_its_own(capsys, error):
    with pytest.raises(SystemExit) as caught, errors_as_text():
        raise error
    assert caught.value.code == 75 and capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConfigError("seed: got -1"), "error: seed: got -1"),
        (StorageError("s3://a: no such bucket"), "error: s3://a: no such bucket"),
        (StageError("the loss is nan"), "error: the loss is nan"),
        (FileNotFoundError(errno.ENOENT, "…", "a/b"), "error: a/b: not there; run the stage that makes it first"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "error: [Errno 28] No space left on device; make space and start again",
        ),
    ],
)
def test_what_has_to_be_changed_ends_with_status_1(error, text):
    with pytest.raises(SystemExit) as caught, errors_as_text():
        raise error
    assert caught.value.code == text  # which Python prints, and ends with 1


def test_of_values_our_own_words_are_shown_and_mistakes_keep_their_traceback(tmp_path):
    with pytest.raises(SystemExit, match=f"error: {tmp_path}: not a data directory"), errors_as_text():
        TokenData(tmp_path)
    mistakes = (lambda: int("x"), lambda: json.loads("{"), lambda: list(zip("a", "", strict=True)))
    for mistake in mistakes:
        with pytest.raises(ValueError), errors_as_text():
            mistake()
    with pytest.raises(PermissionError), errors_as_text():
        raise PermissionError(errno.EACCES, "Permission denied", "a")


STAGES = ("prepare_data", "parent", "rank", "train_short", "train_extended", "extract", "evaluate", "report")


@pytest.mark.parametrize("parameters", ["missing", "wrong", "right"])
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_without_its_parameters_or_inputs_says_so(values, tmp_path, monkeypatch, capsys, name, parameters):
    if parameters == "right" and name == "prepare_data":
        pytest.skip("it needs nothing else")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(variable, "1")  # which evaluate sets
    if parameters != "missing":
        write(values | ({"sead": 1} if parameters == "wrong" else {}), tmp_path, monkeypatch)
    if parameters == "right" and name == "train_extended":  # its key is what it needs first
        make_workspace(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run_stage(name, *(["small"] if name in ("extract", "evaluate") else []))
    words = {
        "missing": "params.yaml: does not exist; run from the top directory of a checkout",
        "wrong": "params.yaml: sead: unknown parameter; did you mean 'seed'",
        "right": "artifacts/",
    }
    assert caught.value.code.startswith("error: ") and words[parameters] in caught.value.code
    assert "Traceback" not in capsys.readouterr().err


def test_a_process_ends_with_the_status():
    code = """
from tasks.runtime.exit_status import StageInterrupted, errors_as_text
with errors_as_text():
    raise StageInterrupted("lost")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (os.EX_TEMPFAIL, "error: lost\n")
