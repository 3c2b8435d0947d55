"""Fingerprints change with the files and with nothing else; unchanged files are not read again."""

import functools
import http.server
import os
import threading
import time

import pytest

from elastic_core.io import fingerprints, storage
from elastic_core.io.fingerprints import DigestCache, fingerprint


@pytest.fixture
def place(place):
    """A place with three files."""
    for name in ("a.txt", "b.txt", "deep/c.txt"):
        storage.write_bytes(storage.join(place, name), name.encode())
    return place


def take(place, tmp_path, pattern="*.txt", **options):
    cache = DigestCache(tmp_path / "digests.json")
    found = fingerprint(storage.join(place, pattern) if pattern else place, cache, **options)
    cache.save()
    return found


def test_every_change_is_seen(place, tmp_path):
    first = take(place, tmp_path)
    assert (first["files"], first["bytes"]) == (2, 10) and take(place, tmp_path) == first
    storage.write_bytes(storage.join(place, "a.txt"), b"A.txt")  # as long as before
    edited = take(place, tmp_path)
    storage.write_bytes(storage.join(place, "new.txt"), b"")
    added = take(place, tmp_path)
    assert len({entry["sha256"] for entry in (first, edited, added)}) == 3 and added["files"] == 3
    storage.remove(storage.join(place, "new.txt"))
    assert take(place, tmp_path) == edited
    assert take(place, tmp_path, "**/*.txt")["files"] == 3


def test_a_directory_and_some_of_its_files(place, tmp_path):
    assert take(place, tmp_path, "")["files"] == 3
    some = take(place, tmp_path, "", only={"a.txt"}.__contains__)
    storage.write_bytes(storage.join(place, "b.txt"), b"other")
    assert some["files"] == 1 and take(place, tmp_path, "", only={"a.txt"}.__contains__) == some


def test_the_place_itself_does_not_count(tmp_path, monkeypatch):
    """Another checkout with the same files has the same fingerprint."""
    found = []
    for name in ("one", "two"):
        (tmp_path / name / "corpus").mkdir(parents=True)
        (tmp_path / name / "corpus" / "a.txt").write_text("text")
        monkeypatch.chdir(tmp_path / name)
        found += [take(os.getcwd(), tmp_path, "corpus/*.txt"), fingerprint("corpus/*.txt", DigestCache("cache"))]
    assert found.count(found[0]) == 4


@pytest.mark.parametrize("name", ["[v2]", "v*", "v?", "[v2"])
@pytest.mark.parametrize("pattern", ["", "a.txt", "*.txt", "[a]?.*", "deep/[1].txt"])
def test_a_name_that_exists_is_no_pattern(tmp_path, monkeypatch, name, pattern):
    """Names with wildcards of a directory on the way, of the directory itself and of a file."""
    place = tmp_path / name / "corpus"
    for file in ("a.txt", "ab.txt", "deep/[1].txt", "deep/1.txt"):
        storage.write_bytes(place / file, b"text")
    location = os.path.join(place, pattern) if pattern else str(place)
    found = take(location, tmp_path, "")
    assert found["files"] == {"": 4, "*.txt": 2}.get(pattern, 1)
    monkeypatch.chdir(tmp_path)
    assert fingerprint(os.path.relpath(location), DigestCache("cache")) == found  # relative
    monkeypatch.chdir(tmp_path / name)
    assert fingerprint(os.path.relpath(location), DigestCache("cache")) == found
    for file in place.rglob("*.txt"):
        file.write_bytes(b"new!")
    assert take(location, tmp_path, "") != found
    if pattern:
        assert len(storage.glob(location)) == found["files"]
    assert storage.num_bytes(location) == (0 if pattern in ("*.txt", "[a]?.*") else 4 * found["files"])


def test_an_unchanged_file_is_not_read_again_and_a_large_one_never(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    first = take(str(tmp_path), tmp_path)
    monkeypatch.setattr(fingerprints, "file_digest", lambda path: pytest.fail("was read"))
    assert take(str(tmp_path), tmp_path) == first
    monkeypatch.setattr(fingerprints, "SMALL_BYTES", 3)
    large = take(str(tmp_path), tmp_path)
    assert take(str(tmp_path), tmp_path) == large != first
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    assert take(str(tmp_path), tmp_path) != large


def test_files_of_a_web_server_that_tells_no_version(tmp_path):
    """Their content counts; one file and a pattern."""
    directory = tmp_path / "web"
    directory.mkdir()
    for name in "ab":
        (directory / f"{name}.jsonl").write_text(name)
    handler = functools.partial(QuietHandler, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        one, both = take(place, tmp_path, "a.jsonl"), take(place, tmp_path, "*.jsonl")
        assert (one["files"], one["bytes"], both["files"], both["bytes"]) == (1, 1, 2, 2)
        (directory / "a.jsonl").write_text("A")
        assert take(place, tmp_path, "a.jsonl") != one and take(place, tmp_path, "*.jsonl") != both
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.mark.thorough
def test_ten_thousand_files_take_a_second(tmp_path):
    (tmp_path / "corpus").mkdir()
    for number in range(10_000):
        (tmp_path / "corpus" / f"{number}.txt").write_bytes(b"text")
    first = take(str(tmp_path / "corpus"), tmp_path)
    begin = time.process_time()
    assert take(str(tmp_path / "corpus"), tmp_path) == first
    assert time.process_time() - begin < 2  # a no-op of DVC has five seconds
