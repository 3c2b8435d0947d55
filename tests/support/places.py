"""An S3 server whose calls are counted, and what a directory holds."""

import pytest
import s3fs


class Calls(list):
    """Pairs of an operation and its arguments; `after`, if set, is called with each operation that was answered."""

    after = None


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
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
