"""The smoke profile with all that can be on S3 there: corpus, parent, checkpoints, exports; and the server dies."""

import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from s3_server import SECRET
from test_corpora import texts, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_core import storage
from tasks import extract, parent, prepare_data, rank, train
from tasks.workspace import _merge

pytest.importorskip("ray")

ROOT = Path(__file__).resolve().parents[1]


def write_params(directory, place, **changes):
    """The smoke profile on a corpus, checkpoints and exports below `place`."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    _merge(values, yaml.safe_load((ROOT / "profiles" / "smoke.yaml").read_text()))
    mixture = {"mine": 0.6, "chains": 0.4}
    values["prepare_data"]["sources"] = {
        "mine": {"kind": "files", "path": f"{place}/corpus/*.jsonl", "held_out": 0.1},
        "chains": {"kind": "chains", "documents": 1000, "max_steps": 4},
    }
    for section in (values["parent"]["training"], values["rank"], values["train_short"], values["train_extended"]):
        section["mixture"] = mixture
    values["evaluate"]["held_out"] = ["mine"]
    values["extract"]["destination"] = f"{place}/exports"
    values["compute"]["storage"] = f"{place}/checkpoints"
    _merge(values, changes)
    (directory / "params.yaml").write_text(yaml.safe_dump(values))


def hashes(directory):
    return {path.name: path.read_bytes() for path in directory.rglob("*.safetensors")}


@pytest.mark.slow
def test_the_pipeline_lives_on_s3_and_outlives_the_server(s3, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    write_jsonl(tmp_path / "a.jsonl", texts(400, length=400))
    storage.upload(tmp_path / "a.jsonl", f"{s3.place}/corpus/a.jsonl")

    write_params(tmp_path, s3.place)
    prepare_data.main()
    parent.main()  # trained here, its checkpoints on S3
    assert len(storage.list_names(f"{s3.place}/checkpoints")) == 1
    storage.upload_directory(Path("artifacts/parent"), f"{s3.place}/models/parent")
    trained = hashes(Path("artifacts/parent"))
    shutil.rmtree("artifacts")

    write_params(tmp_path, s3.place, parent={"path": f"{s3.place}/models/parent"})
    prepare_data.main()
    parent.main()  # imported
    assert hashes(Path("artifacts/parent")) == trained
    rank.main()

    train.main("train_short")
    undisturbed = hashes(Path("artifacts/train_short"))
    (run,) = [name for name in storage.list_names(f"{s3.place}/checkpoints") if name.startswith("train_short")]
    storage.remove(f"{s3.place}/checkpoints/{run}")
    shutil.rmtree("artifacts/train_short")
    shutil.rmtree(f"checkpoints/{run}")
    outage = threading.Thread(target=be_away, args=(s3, f"checkpoints/{run}/metrics.jsonl"))
    outage.start()
    train.main("train_short")  # the server is away while it saves
    outage.join()
    assert hashes(Path("artifacts/train_short")) == undisturbed

    train.main("train_extended")
    monkeypatch.setattr(sys, "argv", ["extract", "small"])
    extract.main()
    storage.download_directory(f"{s3.place}/exports/small/extended", tmp_path / "downloaded")
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
