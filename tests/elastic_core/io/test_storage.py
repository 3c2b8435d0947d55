"""Places on disk and on a real S3 server: the same content either way, refusals in seconds, outages survived."""

import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from elastic_core.io import filesystem, storage
from elastic_core.io.storage import StorageError, StorageUnavailable
from tests.support.marks import thorough
from tests.support.places import files_below, model_directory
from tests.support.s3_server import SECRET

MIB = 1 << 20


def test_urls_are_told_from_paths_and_joined():
    assert storage.is_url("s3://bucket/a") and storage.is_url("gs://b")
    assert not any(map(storage.is_url, ["a/b", "/a", "C:/a", "a:b", "", None]))
    assert storage.join("s3://bucket/a/", "b", "c") == "s3://bucket/a/b/c"
    assert storage.join("a", "b", "c") == os.path.join("a", "b", "c")


def test_small_files(place):
    file = storage.join(place, "sub", "a.json")
    assert not storage.exists(place) and storage.list_names(place) == []
    storage.write_bytes(file, b"one")
    storage.write_bytes(file, b"other")
    assert storage.read_bytes(file) == b"other"
    assert storage.exists(file) and storage.exists(place)
    assert storage.list_names(place) == ["sub"] and storage.list_names(storage.join(place, "sub")) == ["a.json"]
    assert storage.list_names(file) == []
    storage.write_bytes(storage.join(place, "sub", "b.json"), b"")  # a listing is never remembered
    assert storage.list_names(storage.join(place, "sub")) == ["a.json", "b.json"]
    storage.remove(file)
    assert not storage.exists(file) and storage.list_names(storage.join(place, "sub")) == ["b.json"]
    storage.remove(place)
    assert not storage.exists(storage.join(place, "sub", "b.json"))  # this server keeps empty directories for a while
    assert storage.list_names(storage.join(place, "sub")) == []
    storage.remove(place)
    with pytest.raises(StorageError, match=r"a\.json: cannot read it: "):
        storage.read_bytes(file)


def test_a_bucket_is_not_removed(s3):
    storage.write_bytes(storage.join(s3.place, "a"), b"a")
    with pytest.raises(StorageError, match="names a whole bucket"):
        storage.remove(f"s3://{s3.bucket}/")
    assert storage.read_bytes(storage.join(s3.place, "a")) == b"a"


def test_large_files_go_there_and_back(place, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_PART_BYTES", 5 * MIB)  # S3's smallest
    data = os.urandom(11 * MIB + 7)
    (tmp_path / "source").write_bytes(data)
    url = storage.join(place, "sub", "file")
    storage.upload(tmp_path / "source", url)
    storage.download(url, tmp_path / "deeper" / "copy")
    assert (tmp_path / "deeper" / "copy").read_bytes() == data
    assert [path.name for path in (tmp_path / "deeper").iterdir()] == ["copy"]
    with storage.open_binary(url) as file:
        assert file.read(100) == data[:100]
        assert file.seek(-5, os.SEEK_END) == len(data) - 5 and file.read() == data[-5:]
        file.seek(3)
        assert file.read(6 * MIB) == data[3 : 6 * MIB + 3]
    with pytest.raises((StorageError, FileNotFoundError)):
        storage.download(storage.join(place, "nothing"), tmp_path / "nothing")
    assert not any("nothing" in path.name for path in tmp_path.iterdir())


def test_a_stream_asks_only_for_what_is_read(s3, tmp_path, calls):
    (tmp_path / "lines").write_bytes(b"a line\n" * (3 * MIB))
    url = storage.join(s3.place, "lines")
    storage.upload(tmp_path / "lines", url)
    calls.clear()
    with storage.open_binary(url) as file:
        assert next(file) == b"a line\n"
        assert [arguments["Range"] for method, arguments in calls if method == "get_object"] == [
            f"bytes=0-{4 * MIB - 1}"
        ]
        assert file.read() == b"a line\n" * (3 * MIB - 1)
    assert sum(method == "get_object" for method, _ in calls) == 2


def test_glob_finds_files_with_their_sizes(place):
    for name in ("b.txt", "a.txt", "c.json", "deep/er/d.txt"):
        storage.write_bytes(storage.join(place, *name.split("/")), name.encode())
    assert storage.glob(storage.join(place, "*.txt")) == {storage.join(place, name): 5 for name in ("a.txt", "b.txt")}
    assert list(storage.glob(storage.join(place, "*.txt"))) == [
        storage.join(place, name) for name in ("a.txt", "b.txt")
    ]
    assert storage.join(place, "deep", "er", "d.txt") in storage.glob(storage.join(place, "**", "*.txt"))
    assert storage.glob(storage.join(place, "[ac].*")).keys() == {storage.join(place, n) for n in ("a.txt", "c.json")}
    assert storage.glob(storage.join(place, "*")).keys() == {
        storage.join(place, name) for name in ("a.txt", "b.txt", "c.json")
    }
    assert storage.glob(storage.join(place, "none", "*")) == {}


def test_glob_names_a_link_to_nothing(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a")
    (tmp_path / "good.txt").symlink_to("a.txt")
    assert list(storage.glob(str(tmp_path / "*.txt"))) == [str(tmp_path / "a.txt"), str(tmp_path / "good.txt")]
    (tmp_path / "round.txt").symlink_to("round.txt")
    with pytest.raises(storage.StorageError, match=r"round\.txt: a link to round\.txt, which does not exist; remove"):
        storage.glob(str(tmp_path / "*.txt"))


def test_access_is_granted(place):
    storage.check_access(storage.join(place, "*.jsonl"), writing=False)
    storage.check_access(place, writing=True)
    assert storage.glob(storage.join(place, "*")) == {}  # what was written to find out is gone


WRONG = [
    (
        {"AWS_SECRET_ACCESS_KEY": "a-wrong-secret"},
        "",
        r"does not accept the credentials \(SignatureDoesNotMatch\); set AWS_",
    ),
    (
        {"AWS_ACCESS_KEY_ID": "a-wrong-key"},
        "",
        r"does not accept the credentials \(InvalidAccessKeyId\); set AWS_ACCESS",
    ),
    (
        {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
        "",
        r"no complete credentials .*; set AWS_ACCESS_KEY_ID",
    ),
    ({"AWS_SECRET_ACCESS_KEY": None}, "", r"no complete credentials were found .*; set AWS_ACCESS_KEY_ID"),
    (
        {},
        "s3://no-such-bucket/a",
        r"no such bucket at this endpoint; create it, change the URL, or set AWS_ENDPOINT_URL",
    ),
    ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "", r"no answer \(EndpointConnectionError\); .*AWS_ENDPOINT_URL"),
    ({"AWS_ENDPOINT_URL": f"{SECRET}.example"}, "", r"endpoint or region is not valid; AWS_ENDPOINT_URL is like http"),
    ({}, "s3://no/bucket", r"no (valid|such) bucket"),
    ({}, "gs://bucket/a", r"no library for gs:// is installed; install fsspec's package .*gcsfs"),
    ({}, "s4://bucket/a", r"fsspec does not know s4://"),
    ({}, f"ftp://user:{SECRET}@host/a", "a ftp:// URL carries a user, a password or a signature"),
    ({}, f"https://host/a?X-Amz-Signature={SECRET}", "a https:// URL carries"),
]


@pytest.mark.parametrize("writing", [False, True], ids=["reading", "writing"])
@pytest.mark.parametrize(("environment", "url", "words"), WRONG, ids=range(len(WRONG)))
def test_what_cannot_be_used_is_refused_at_once(s3, monkeypatch, caplog, environment, url, words, writing):
    for name, value in environment.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    caplog.set_level(logging.DEBUG)
    start = time.monotonic()
    with pytest.raises(StorageError, match=words) as caught:
        storage.check_access(url or s3.place, writing)
    assert time.monotonic() - start < 10  # half a second where the machine is not busy
    assert isinstance(caught.value, StorageUnavailable) == ("no answer" in str(caught.value))
    assert caught.value.__context__ is None or caught.value.__suppress_context__  # no traceback shows the cause
    given = [SECRET, *(value for value in environment.values() if value)]
    assert not any(value in str(caught.value) for value in given)
    assert SECRET not in caplog.text and "a-wrong-secret" not in caplog.text


def test_without_s3fs_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # what was imported before
    with pytest.raises(StorageError, match=r"no library for s3:// is installed; pip install 'nemotron-elastic\[s3\]'"):
        storage.check_access("s3://bucket/a", writing=False)


def test_a_server_that_stays_away_is_given_up(s3, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(filesystem, "_ATTEMPTS", 3)
    storage.write_bytes(storage.join(s3.place, "a"), b"a")
    s3.kill()
    (tmp_path / "source").write_bytes(b"x")
    for action in (
        lambda: storage.read_bytes(storage.join(s3.place, "a")),
        lambda: storage.upload(tmp_path / "source", storage.join(s3.place, "b")),
    ):
        with pytest.raises(StorageUnavailable, match=r"cannot (read|write) it: no answer \(EndpointConnectionError\)"):
            action()
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "S3 PutObject: EndpointConnectionError, attempt 2 of 3; trying again" in warnings
    assert not any("?" in message or SECRET in message for message in warnings)


@pytest.fixture
def answering():
    """Starts a server that answers every request with a status and an S3 error's code, and no more; its URL."""
    servers = []

    def start(status, code):
        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                body = f"<Error><Code>{code}</Code><Message>{SECRET}</Message></Error>".encode() if code else b""
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_HEAD = do_PUT = answer

            def log_message(self, *arguments):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (503, "SlowDown", StorageUnavailable),
        thorough(503, "ServiceUnavailable", StorageUnavailable),
        thorough(500, "InternalError", StorageUnavailable),
        (502, "", StorageUnavailable),  # of a proxy, perhaps
        thorough(429, "TooManyRequests", StorageUnavailable),
        thorough(400, "RequestTimeout", StorageUnavailable),
        (501, "NotImplemented", StorageError),
        thorough(400, "InvalidRequest", StorageError),
        (403, "AccessDenied", StorageError),
    ],
)
def test_a_server_that_is_too_busy_is_told_from_one_that_refuses(s3, monkeypatch, answering, status, code, kind):
    monkeypatch.setenv("AWS_ENDPOINT_URL", answering(status, code))
    for action in (storage.check_access, lambda place, _: storage.list_names(place)):
        monkeypatch.setattr(filesystem, "_ATTEMPTS", 1)
        with pytest.raises(StorageError) as caught:
            action("s3://bucket/a", False)
        assert type(caught.value) is kind and SECRET not in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))  # from one worker to another
    assert type(again) is kind and str(again) == str(caught.value)


@pytest.mark.parametrize(("status", "kind"), [(503, StorageUnavailable), (404, StorageError), (403, StorageError)])
def test_the_same_is_told_of_any_http_server(answering, status, kind):
    with pytest.raises(StorageError) as caught:
        storage.read_bytes(answering(status, "") + "/a")
    assert type(caught.value) is kind


@pytest.fixture
def outage(s3):
    """Kills the server, which comes back a little later by itself."""
    threads = []

    def come_back():
        time.sleep(1)
        s3.restart()

    def begin():
        s3.kill()
        threads.append(threading.Thread(target=come_back))
        threads[0].start()

    yield begin
    for thread in threads:
        thread.join()


def once_at(count, method, action):
    """A hook for `calls` that acts after the count-th answer to `method`."""
    answers = []

    def after(name):
        if name == method:
            answers.append(name)
            if len(answers) == count:
                action()

    return after


def test_an_upload_survives_an_outage(s3, tmp_path, monkeypatch, calls, outage):
    monkeypatch.setattr(storage, "_PART_BYTES", 5 * MIB)
    data = os.urandom(32 * MIB)
    (tmp_path / "source").write_bytes(data)
    calls.after = once_at(4, "upload_part", outage)
    storage.upload(tmp_path / "source", storage.join(s3.place, "a"))
    assert storage.read_bytes(storage.join(s3.place, "a")) == data


def test_a_stream_survives_an_answer_that_breaks_off(s3, tmp_path, calls, outage):
    data = os.urandom(40 * MIB)
    url = storage.join(s3.place, "a")
    (tmp_path / "source").write_bytes(data)
    storage.upload(tmp_path / "source", url)
    calls.after = once_at(1, "get_object", outage)  # the answer's head is there, most of its body is not
    with storage.open_binary(url, 2 * len(data)) as file:
        assert file.read() == data
    assert sum(method == "get_object" for method, _ in calls) == 2


def test_a_download_survives_an_outage(s3, tmp_path, calls, outage, caplog):
    data = os.urandom(20 * MIB)
    url = storage.join(s3.place, "a")
    (tmp_path / "source").write_bytes(data)
    storage.upload(tmp_path / "source", url)
    calls.after = once_at(3, "get_object", outage)
    storage.download(url, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    assert "trying again" in caplog.text and SECRET not in caplog.text and "?" not in caplog.text


def test_dvc_pushes_and_pulls(s3, tmp_path):
    def dvc(*commands):
        """Some commands in one process: starting DVC takes longer than what it does here."""
        code = f"from dvc.cli import main; assert not any(main(command.split()) for command in {commands})"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "repo", capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert SECRET not in done.stdout + done.stderr

    model = model_directory(tmp_path / "repo" / "model")
    expected = files_below(model)
    remote = f"remote add --default s3 {storage.join(s3.place, 'dvc')}"
    dvc("init --no-scm --quiet", "config core.analytics false", remote, "add --quiet model", "push --quiet")
    shutil.rmtree(model)
    shutil.rmtree(tmp_path / "repo" / ".dvc" / "cache")
    dvc("pull --quiet")
    assert files_below(model) == expected
    assert SECRET not in (tmp_path / "repo" / ".dvc" / "config").read_text()
