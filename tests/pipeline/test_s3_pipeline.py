"""The smoke profile with all that can be on S3 there: corpus, parent, checkpoints, exports; and the server dies."""

import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_core.io import storage
from elastic_core.io.directory_transfer import download_directory, upload_directory
from tasks import fingerprint, parent, prepare_data, rank
from tests.support.pipeline.corpora import texts, write_jsonl
from tests.support.pipeline.dvc_workspace import make_workspace
from tests.support.pipeline.stages import run_stage
from tests.support.pipeline.tiny_pipeline import write_params
from tests.support.s3_server import SECRET

pytest.importorskip("ray")


def hashes(directory):
    return {path.name: path.read_bytes() for path in directory.rglob("*.safetensors")}


@pytest.mark.thorough
@pytest.mark.slow
def test_the_pipeline_lives_on_s3_and_outlives_the_server(s3, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    write_jsonl(tmp_path / "a.jsonl", texts(400, length=400))
    storage.upload(tmp_path / "a.jsonl", f"{s3.place}/corpus/a.jsonl")

    make_workspace(tmp_path)
    write_params(tmp_path, s3.place)
    fingerprint.main()
    prepare_data.main()
    parent.main()  # trained here, its checkpoints on S3
    assert len(storage.list_names(f"{s3.place}/checkpoints")) == 1
    upload_directory(Path("artifacts/parent"), f"{s3.place}/models/parent")
    trained = hashes(Path("artifacts/parent"))
    shutil.rmtree("artifacts")

    write_params(tmp_path, s3.place, parent={"path": f"{s3.place}/models/parent"})
    fingerprint.main()
    prepare_data.main()
    parent.main()  # imported
    assert hashes(Path("artifacts/parent")) == trained
    rank.main()

    run_stage("train_short")
    undisturbed = hashes(Path("artifacts/train_short"))
    (run,) = [name for name in storage.list_names(f"{s3.place}/checkpoints") if name.startswith("train_short")]
    storage.remove(f"{s3.place}/checkpoints/{run}")
    shutil.rmtree("artifacts/train_short")
    shutil.rmtree(f"checkpoints/{run}")
    outage = threading.Thread(target=be_away, args=(s3, f"checkpoints/{run}/metrics.jsonl"))
    outage.start()
    run_stage("train_short")  # the server is away while it saves
    outage.join()
    assert hashes(Path("artifacts/train_short")) == undisturbed

    run_stage("train_extended")
    run_stage("extract", "small")
    download_directory(f"{s3.place}/exports/small/extended", tmp_path / "downloaded")
    ids = torch.arange(1, 12)[None]
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(directory).eval()(ids).logits
        for directory in ("artifacts/models/small/extended", tmp_path / "downloaded")
    )
    assert torch.equal(ours, theirs)
    assert AutoTokenizer.from_pretrained(tmp_path / "downloaded").eos_token_id is not None
    shown = caplog.text + "".join(capsys.readouterr())
    assert SECRET not in shown
    assert not any(SECRET.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def be_away(server, metrics):
    """Kill the server soon after the first step of a run, and bring it back a little later."""
    while not Path(metrics).exists() or len(Path(metrics).read_text().splitlines()) < 12:
        time.sleep(0.01)
    server.kill()
    time.sleep(2)
    server.restart()
