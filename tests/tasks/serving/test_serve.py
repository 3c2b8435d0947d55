"""`elastic serve` as a command: what it refuses before it loads weights, and what it says."""

import json
import socket
from types import SimpleNamespace

import pytest
import torch
from starlette.testclient import TestClient

from elastic_core.errors import UserError
from tasks.serving import serve as command
from tests.support.models.served_family import write_served_family


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("command") / "family"
    write_served_family(directory, "llama")
    return directory


@pytest.mark.parametrize(
    "options, message",
    [
        ({"timeout": 0}, "--timeout: got 0; allowed: more than 0 seconds"),
        ({"context": 513}, r"--context: got 513; allowed: 1 to 512 \(max_position_embeddings"),
        ({"max_batch": 0}, "--max-batch: got 0; allowed: 1 or more"),
        ({"max_waiting": -1}, "--max-waiting: got -1; allowed: 1 or more"),
        ({"host": "256.0.0.1"}, "--host 256.0.0.1 --port 0: "),
    ],
)
def test_wrong_options_are_refused_before_weights_are_read(directory, monkeypatch, options, message):
    monkeypatch.setattr(command, "load", None)
    with pytest.raises(UserError, match=message):
        command.serve(directory, **{"port": 0, **options})


def test_a_port_that_is_taken_and_a_wrong_device(directory, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="name a free port"):
        command.serve(directory, port=taken.getsockname()[1])
    with pytest.raises(UserError, match=r"--device: got 'abacus' .*allowed: cpu"):
        command.serve(directory, port=0, device="abacus")


def test_what_it_serves_and_says(directory, monkeypatch, capsys):
    """The key is that of the environment, and is not printed."""
    seen = []
    server = SimpleNamespace(run=lambda sockets: None)
    monkeypatch.setattr(command, "new_server", lambda app, engine: seen.append(app) or server)
    monkeypatch.setenv(command.KEY, "a-secret-key")
    command.serve(directory, port=0, dtype="bfloat16", context=100, max_batch=3)
    out, err = capsys.readouterr()
    budgets = "full (27,936), medium (14,184), small (7,536); those in between too, such as 0.8"
    for part in ("http://127.0.0.1:", budgets, "context 100 tokens; 3 texts"):
        assert part in out
    assert "a-secret-key" not in out + err and "warning" not in err
    with TestClient(seen[0]) as client:
        assert client.get("/v1/models").status_code == 401
        models = client.get("/v1/models", headers={"Authorization": "Bearer a-secret-key"}).json()["data"]
        assert [model["max_model_len"] for model in models] == [100] * 3
    monkeypatch.delenv(command.KEY)
    content = json.loads((directory / "elastic.json").read_text())
    (directory / "elastic.json").write_text(json.dumps({**content, "path": []}))  # as of an adopted family
    command.serve(directory, host="0.0.0.0", port=0)
    (directory / "elastic.json").write_text(json.dumps(content))
    out, err = capsys.readouterr()
    assert "everyone who reaches 0.0.0.0 can use this server" in err and "in between" not in out
    with TestClient(seen[1]) as client:
        answer = client.post("/v1/completions", json={"model": "small", "prompt": "a", "max_tokens": 3}).json()
        assert answer["usage"]["completion_tokens"] <= 3
    assert torch.is_grad_enabled()


def test_a_directory_that_is_no_family_or_cannot_be_read(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "new_server", None)
    for missing, message in (("elastic.json", r"no elastic\.json"), ("tokenizer.json", r"no tokenizer \(")):
        copy = tmp_path / missing
        copy.mkdir()
        for file in directory.iterdir():
            if file.name != missing:
                (copy / file.name).write_bytes(file.read_bytes())
        with pytest.raises(UserError, match=message):
            command.serve(copy, port=0)
    broken = tmp_path / "elastic.json"
    (broken / "elastic.json").write_bytes((directory / "elastic.json").read_bytes())
    (broken / "generation_config.json").write_text('{"top_k": -3}')
    with pytest.raises(UserError, match=r"transformers cannot use it .*correct generation_config\.json"):
        command.serve(broken, port=0)
