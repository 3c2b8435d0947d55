"""Ray's own directory: short enough for its sockets, whatever TMPDIR is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_core.config import ConfigError
from tasks.runtime import ray_cluster
from tasks.runtime.ray_cluster import short_directory

ROOT = Path(__file__).resolve().parents[3]
SHORT_ENOUGH = "/" + "d" * 38
START = """
import glob, os, sys
from tasks.runtime.ray_cluster import cluster
from tasks.settings.sections import Compute
with cluster(Compute(workers=1), None):
    import ray
    print(ray.get(ray.remote(lambda: 7).remote()))
"""


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_long_directory_is_replaced_by_a_short_one_that_ends_with_the_cluster(tmp_path, monkeypatch, name):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, SHORT_ENOUGH)
    with short_directory() as found:
        assert found is None
    monkeypatch.setenv(name, SHORT_ENOUGH + "d")
    with short_directory() as found:
        assert Path(found).is_dir() and len(found) < 20
    assert not Path(found).exists()


def test_without_any_short_directory_the_variable_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(ray_cluster, "SHORT", str(tmp_path / "missing"))
    monkeypatch.setenv("TMPDIR", "/" + "d" * 80)
    message = r"^TMPDIR: got '/d+'; allowed: a directory with a path of up to 39 bytes, "
    with pytest.raises(ConfigError, match=message), short_directory():
        pass


@pytest.mark.thorough
@pytest.mark.ray
def test_ray_starts_under_a_long_directory(tmp_path):
    long = tmp_path / ("d" * 100)
    long.mkdir()
    environment = {**os.environ, "TMPDIR": str(long), "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_TMPDIR", None)
    done = subprocess.run([sys.executable, "-c", START], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr
    assert not any(long.glob("ray*"))
