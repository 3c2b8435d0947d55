"""A server on this machine that takes models as the Hugging Face hub does: what huggingface_hub asks for an upload."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

TOKEN, OWNERS = "hf_the_secret", ("me", "team")


class Repositories:
    """`files[name][branch]` has the files of a repository; `commits`: (name, branch, title) of every commit."""

    def __init__(self):
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[tuple[str, str, str]] = []
        self.large: dict[str, bytes] = {}  # uploaded by their SHA-256, before the commit names them
        self.status: int | None = None  # of all answers, for failures


class Handler(BaseHTTPRequestHandler):
    hub: Repositories
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        lines = [json.loads(line) for line in data.split(b"\n") if line.strip()]
        self.answer(lines[0] if len(lines) == 1 and "key" not in lines[0] else lines)

    def do_PUT(self) -> None:
        self.hub.large[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_json({})

    def answer(self, content) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        if hub.status is not None:
            self.send_json({"error": "secret text"}, hub.status)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send_json({"error": "secret text"}, 401)
        elif path == "/api/whoami-v2":
            self.send_json({"name": OWNERS[0], "orgs": [{"name": name} for name in OWNERS[1:]]})
        elif path == "/api/validate-yaml":  # of the card
            errors = [] if "license: wrong" not in content["content"] else [{"message": "license"}]
            self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)
        elif path == "/api/repos/create":
            name = f"{content['organization']}/{content['name']}"
            status = 409 if name in hub.files else 200
            hub.files.setdefault(name, {"main": {".gitattributes": b"lfs"}})
            hub.private.setdefault(name, content.get("visibility") == "private")
            self.send_json({"url": f"http://{self.headers['Host']}/{name}"}, status)
        elif path.endswith(".git/info/lfs/objects/batch"):
            put = f"http://{self.headers['Host']}/put"
            objects = [{**one, "actions": {"upload": {"href": f"{put}/{one['oid']}"}}} for one in content["objects"]]
            self.send_json({"transfer": "basic", "objects": objects})
        else:
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            self.answer_repository(f"{owner}/{name}", rest, content)

    def answer_repository(self, name: str, rest: list[str], content) -> None:
        branches = self.hub.files[name]
        if not rest:
            self.send_json({"id": name, "private": self.hub.private[name], "siblings": []})
        elif rest[0] == "branch":
            status = 409 if rest[1] in branches else 200
            branches.setdefault(rest[1], dict(branches["main"]))
            self.send_json({}, status)
        elif rest[0] == "tree":
            files = branches[rest[1]].items()
            self.send_json([{"type": "file", "path": file, "size": len(data), "oid": "x"} for file, data in files])
        elif rest[0] == "preupload":
            modes = {
                file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in content["files"]
            }
            self.send_json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        else:
            assert rest[0] == "commit"
            self.commit(name, rest[1], content)

    def commit(self, name: str, branch: str, lines: list[dict]) -> None:
        files = self.hub.files[name][branch]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.commits.append((name, branch, lines[0]["value"]["summary"]))
        url = f"http://{self.headers['Host']}/{name}/commit/1"
        self.send_json({"success": True, "commitOid": "1", "commitUrl": url, "hookOutput": ""})

    def send_json(self, content, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def uploads(monkeypatch) -> Iterator[Repositories]:
    """A server that huggingface_hub takes for the hub, and a token that it accepts."""
    hub = Repositories()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def headings(card: bytes) -> list[str]:
    """The titles of a card's sections."""
    return re.findall(r"^## (.*)$", card.decode(), re.MULTILINE)
