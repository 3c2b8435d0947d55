"""Models of the Hugging Face hub: a server on this machine with what huggingface_hub asks for, and a prepared cache."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class Hub:
    """Models by name: each has a commit, and files of which the large ones are named by SHA-256, as git-LFS does."""

    def __init__(self):
        self.commits: dict[str, str] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.cut: set[str] = set()  # files of which the next answer ends after half of the bytes
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range

    def put(self, name: str, files: Mapping[str, bytes], commit: str) -> None:
        self.files[name], self.commits[name] = dict(files), commit

    def ranges_of(self, file: str) -> list[str | None]:
        """The ranges of bytes in which a file was downloaded (None: from its start)."""
        return [wanted for method, path, wanted in self.asked if method == "GET" and path.endswith(f"/{file}")]

    def entries(self, name: str) -> list[dict]:
        found = []
        for path, data in self.files[name].items():
            entry = {"type": "file", "path": path, "rfilename": path, "size": len(data)}
            entry |= {"oid": digest_of(path, data, lfs=False), "blobId": digest_of(path, data, lfs=False)}
            if is_large(path):
                entry["lfs"] = {"sha256": digest_of(path, data), "oid": digest_of(path, data), "size": len(data)}
                entry["lfs"]["pointerSize"] = 134
            found.append(entry)
        return found


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def digest_of(path: str, data: bytes, lfs: bool = True) -> str:
    """The name of a file in the hub's cache."""
    if lfs and is_large(path):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def write_cache(cache: Path, name: str, files: Mapping[str, bytes], commit: str, revision: str = "main") -> Path:
    """The hub's cache after a download of these files. Returns the directory with them."""
    top = cache / f"models--{name.replace('/', '--')}"
    directory = top / "snapshots" / commit
    for path, data in files.items():
        blob, file = top / "blobs" / digest_of(path, data), directory / path
        for place in (blob, file):
            place.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        file.symlink_to(blob)
    (top / "refs").mkdir(exist_ok=True)
    (top / "refs" / revision).write_text(commit)
    return directory


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        hub, path = self.hub, self.path.partition("?")[0].strip("/")
        hub.asked.append((self.command, path, self.headers.get("Range")))
        is_api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        revision = rest[1] if len(rest) > 1 else "main"
        if name not in hub.files:
            self.send(404, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", hub.commits[name]):
            self.send(404, {"X-Error-Code": "RevisionNotFound"})
        elif is_api and rest[:1] == ["tree"]:
            self.send_json(hub.entries(name))
        elif is_api:
            self.send_json({"id": name, "sha": hub.commits[name], "siblings": hub.entries(name)})
        elif name in hub.gated:
            self.send(403, {"X-Error-Code": "GatedRepo"})
        else:
            self.send_file(name, "/".join(rest[2:]), with_body)

    def send_file(self, name: str, file: str, with_body: bool) -> None:
        commit = {"X-Repo-Commit": self.hub.commits[name]}
        if file not in self.hub.files[name]:
            self.send(404, {"X-Error-Code": "EntryNotFound", **commit})
            return
        data = self.hub.files[name][file]
        headers, start = {"ETag": f'"{digest_of(file, data)}"', "Accept-Ranges": "bytes", **commit}, 0
        if (wanted := self.headers.get("Range")) is not None:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send_response(206 if start else 200)
        for key, value in {**headers, "Content-Length": str(len(data) - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            end = len(data)
            if file in self.hub.cut:
                self.hub.cut.remove(file)
                end = len(data) // 2
                self.close_connection = True
            self.wfile.write(data[start:end])

    def send_json(self, content) -> None:
        self.send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def send(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serve() -> Iterator[tuple[Hub, str]]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub. The hub may not be asked, as in all tests."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def hub_server(hub_cache, monkeypatch) -> Iterator[Hub]:
    """A server that huggingface_hub takes for the hub, with an empty cache."""
    with serve() as (hub, url):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub
