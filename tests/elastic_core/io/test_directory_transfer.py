"""Directories copied to a place and back, on disk and on a real S3 server: complete or not at all, and one version."""

import errno
import os
import threading

import pytest

from elastic_core.errors import UserError
from elastic_core.io import storage
from elastic_core.io.directory_transfer import download_directory, local_files, move, upload_directory
from elastic_core.io.storage import StorageError
from tests.support.places import files_below, model_directory


def test_a_directory_goes_there_and_back(place, tmp_path):
    url = storage.join(place, "model")
    source = model_directory(tmp_path / "source")
    upload_directory(source, url)
    download_directory(url, tmp_path / "copy")
    assert files_below(tmp_path / "copy") == files_below(source)
    other = model_directory(tmp_path / "other", b"22")
    (other / "sub" / "more.txt").rename(other / "new.txt")
    upload_directory(other, url)  # what the new one lacks is gone
    download_directory(url, tmp_path / "second")
    assert files_below(tmp_path / "second") == files_below(other)
    download_directory(url, tmp_path / "part", only={"config.json", "absent"}.__contains__)
    assert files_below(tmp_path / "part") == {"config.json": b"{}22"}
    with pytest.raises(StorageError, match="exists already"):
        download_directory(url, tmp_path / "part")
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "copy", "other", "second", "part", "place"}


def test_a_directory_is_not_copied_over_itself(tmp_path):
    source = model_directory(tmp_path / "source")
    before = files_below(source)
    for location in (source, f"{source}/.", tmp_path, source / "sub"):
        with pytest.raises(UserError, match=r"(or contains it|lies in .*); name another directory"):
            upload_directory(source, location)
    assert files_below(source) == before


def test_a_half_written_directory_is_never_taken_for_whole(place, tmp_path, monkeypatch):
    url = storage.join(place, "model")
    upload_directory(model_directory(tmp_path / "first"), url)
    second, original = model_directory(tmp_path / "second", b"22"), storage.upload

    def fail_at_last(source, target):
        if source.name == "config.json":
            raise StorageError("away")
        original(source, target)

    monkeypatch.setattr(storage, "upload", fail_at_last)
    with pytest.raises(StorageError, match="away"):
        upload_directory(second, url)
    with pytest.raises(
        StorageError, match=r"has no config\.json; it is another kind of directory, or its upload was not finished"
    ):
        download_directory(url, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    monkeypatch.setattr(storage, "upload", original)
    upload_directory(second, url)
    download_directory(url, tmp_path / "copy")
    assert files_below(tmp_path / "copy") == files_below(second)
    (second / "config.json").unlink()
    with pytest.raises(StorageError, match=r"no config\.json, so it is not complete"):
        upload_directory(second, url)
    assert storage.exists(storage.join(url, "config.json"))


def test_a_download_that_was_cut_off_goes_on(place, tmp_path, monkeypatch):
    url, original, fetched, broken = storage.join(place, "model"), storage.download, [], ["model.safetensors"]
    upload_directory(model_directory(tmp_path / "source"), url)

    def fail_once(source, target):
        if target.name in broken:
            broken.clear()
            raise StorageError("away")
        original(source, target)
        fetched.append(target.name)

    monkeypatch.setattr(storage, "download", fail_once)
    with pytest.raises(StorageError, match="away"):
        download_directory(url, tmp_path / "copy")
    assert not (tmp_path / "copy").exists() and "config.json" in fetched and "model.safetensors" not in fetched
    download_directory(url, tmp_path / "copy")
    assert sorted(fetched) == ["config.json", "model.safetensors", "more.txt"]  # none of them twice
    assert files_below(tmp_path / "copy") == files_below(tmp_path / "source")


def test_a_directory_comes_some_files_at_a_time(s3, tmp_path, calls, monkeypatch):
    for i in range(6):
        storage.write_bytes(storage.join(s3.place, str(i)), str(i).encode())
    together, original = threading.Barrier(3, timeout=60), storage.download

    def meet(source, target):
        together.wait()  # three are under way before one of them ends
        original(source, target)

    monkeypatch.setattr(storage, "download", meet)
    download_directory(s3.place, tmp_path / "copy", last="0")
    assert files_below(tmp_path / "copy") == {str(i): str(i).encode() for i in range(6)}
    assert sum(method == "get_object" for method, _ in calls) == 6


def test_a_download_does_not_mix_two_versions(place, tmp_path, monkeypatch):
    url, original = storage.join(place, "model"), storage.download
    upload_directory(model_directory(tmp_path / "source"), url)

    def change_meanwhile(source, target):
        original(source, target)
        if target.name == "more.txt":
            storage.write_bytes(storage.join(url, "model.safetensors"), b"another")

    monkeypatch.setattr(storage, "download", change_meanwhile)
    with pytest.raises(StorageError, match="changed during the download"):
        download_directory(url, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_small_files_are_copied_next_to_no_weights(place):
    for name in ("config.json", "sub/more.jinja", "model.safetensors"):
        storage.write_bytes(storage.join(place, name), name.encode())
    with local_files(place, {"config.json", "sub/more.jinja", "vocab.json"}.__contains__) as local:
        assert (local / "config.json").read_bytes() == b"config.json"
        assert (local / "sub" / "more.jinja").is_file() and not (local / "vocab.json").exists()
        assert storage.is_url(place) != (local / "model.safetensors").exists()
    assert local.exists() != storage.is_url(place)


def checkpoint(place) -> dict[str, bytes]:
    """A directory with a manifest at a place; the content of its files by name."""
    files = {"a.distcp": b"a" * 9, "deeper/b": b"b", "manifest.json": b"{}", "z.distcp": b"z"}
    for name, content in files.items():
        storage.write_bytes(storage.join(place, name), content)
    return files


def content(place) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(place, name)) for name in storage.versions(place)}


KINDS = [("disk", "s3"), ("s3", "disk"), ("s3", "s3"), ("memory", "s3"), ("disk", "another disk"), ("disk", "disk")]


@pytest.mark.parametrize("kinds", KINDS, ids=" to ".join)
def test_a_directory_moves_between_any_two_places_and_goes_on_after_an_interruption(s3, tmp_path, monkeypatch, kinds):
    """Its manifest comes last: at no moment does a part of it look like a complete checkpoint."""
    roots = {
        "disk": str(tmp_path),
        "another disk": str(tmp_path / "b"),
        "s3": s3.place,
        "memory": f"memory://{s3.place}",
    }
    source, target = (storage.join(roots[kind], name) for kind, name in zip(kinds, ("from", "to"), strict=True))
    files, last = checkpoint(source), []
    remove = storage.remove

    def interrupted(location):
        last.append(sorted(content(target)))
        raise KeyboardInterrupt

    def rename(*paths):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), *paths)

    if kinds[1] == "another disk":
        monkeypatch.setattr(os, "rename", rename)
    if kinds != ("disk", "disk"):
        monkeypatch.setattr(storage, "remove", interrupted)
        with pytest.raises(KeyboardInterrupt):
            move(source, target)
        assert last == [sorted(files)] and content(source) == files
        monkeypatch.setattr(storage, "remove", remove)
        remove(storage.join(source, "manifest.json"))  # the removal has begun
    move(source, target)
    assert content(target) == files and not content(source)
    move(storage.join(target, "z.distcp"), storage.join(source, "z"))
    assert content(source) == {"z": b"z"}
    move(source, source)
    assert content(source) == {"z": b"z"}


def test_the_manifest_of_a_directory_that_moves_is_copied_last(tmp_path, monkeypatch):
    from elastic_core.training.checkpoint import MANIFEST

    source, target, copied = str(tmp_path / "from"), f"memory://{tmp_path}/to", []
    files = checkpoint(source)
    monkeypatch.setattr(storage, "upload", lambda path, url: copied.append(os.path.relpath(path, source)))
    move(source, target)
    assert sorted(copied) == sorted(files) and copied[-1] == MANIFEST
