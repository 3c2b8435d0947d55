"""Places on disk and on an S3 server, the tests that need that server, its calls, and directories to copy."""

import pytest
import s3fs


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the S3 server."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if "s3_session" in getattr(item, "fixturenames", ()) or parameters.get("place") == "s3":
            item.add_marker("s3")


class Calls(list):
    """Pairs of an operation and its arguments; `after`, if set, is called with each operation that was answered."""

    after = None


@pytest.fixture(params=["disk", "s3"])
def place(request, tmp_path):
    """A place without anything in it, of both kinds."""
    return str(tmp_path / "place") if request.param == "disk" else request.getfixturevalue("s3").place


@pytest.fixture
def calls(monkeypatch):
    """What is asked of the S3 server, once it is answered."""
    original, calls = s3fs.S3FileSystem._call_s3, Calls()

    async def call(self, method, *lists, **arguments):
        answer = await original(self, method, *lists, **arguments)
        calls.append((method, arguments))
        if calls.after is not None:
            calls.after(method)
        return answer

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", call)
    return calls


def files_below(directory):
    """Path → content of all files below a directory, without compiled code, which importing a module may write."""
    files = (path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def model_directory(path, seed=b"1"):
    """A directory with the files that a model's has, one of them deeper."""
    (path / "sub").mkdir(parents=True)
    (path / "config.json").write_bytes(b"{}" + seed)
    (path / "model.safetensors").write_bytes(seed * 1000)
    (path / "sub" / "more.txt").write_bytes(b"more")
    return path
