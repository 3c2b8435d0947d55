"""Shared fixtures, and what holds for every test: nothing is looked up outside of this machine."""

import gc
import os
import random
import sys

import pytest

gc.disable()  # until all tests are collected

# The longest groups begin first, so that no worker of pytest-xdist is left alone with one of them at the end.
LONG_FIRST = ("browser", "kill", "server", "ray", "slow", "s3")

pytest_plugins = [
    *("tests.support.runs", "tests.support.places", "tests.support.committed_params", "tests.support.hub_server"),
]
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", DO_NOT_TRACK="1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # some tests compare bits with a process of one thread


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """What a test draws at random does not depend on the tests before it."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def s3_session():
    """One S3 server for all tests."""
    from tests.support.s3_server import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_session, monkeypatch):
    """The running server, to which the environment points for one test; `s3.place` is a URL of the test's own."""
    import s3fs

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_session.environment.items():
        monkeypatch.setenv(name, value)
    s3_session.new_place()
    s3fs.S3FileSystem.clear_instance_cache()  # they remember the environment that they were made in
    yield s3_session
    s3fs.S3FileSystem.clear_instance_cache()
    s3_session.ensure_running()


def pytest_collection_finish() -> None:
    """The garbage collector begins here and leaves out what is imported: tests took a tenth longer with all of it."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order tests by their group; the order inside a file stays."""

    def place(item: pytest.Item) -> int:
        return next((i for i, name in enumerate(LONG_FIRST) if item.get_closest_marker(name)), len(LONG_FIRST))

    first = {}
    for item in items:  # a file goes where its longest group goes
        first[item.path] = min(place(item), first.get(item.path, len(LONG_FIRST)))
    items.sort(key=lambda item: first[item.path])
