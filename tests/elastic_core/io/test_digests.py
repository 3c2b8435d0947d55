"""Keys of runs: what decides a run's result changes its key, and nothing else does."""

import json
import shutil
import time

import pytest

from elastic_core.io.digests import run_key
from tests.support.runs import make_stage


def test_a_key_changes_with_the_configuration_and_the_inputs(tmp_path):
    file, directory = tmp_path / "a.txt", tmp_path / "inputs"
    (directory / "deep").mkdir(parents=True)
    file.write_text("one")
    (directory / "deep" / "b.txt").write_text("two")
    configuration = {"stage": make_stage(), "seed": 1}
    key = run_key(configuration, [file, directory])
    assert run_key({"seed": 1, "stage": make_stage()}, [file, directory]) == key
    others = {
        run_key({**configuration, "seed": 2}, [file, directory]),
        run_key({**configuration, "stage": make_stage(max_skipped_steps=9)}, [file, directory]),
        run_key(configuration, [directory]),
    }
    file.write_text("1")
    others.add(run_key(configuration, [file, directory]))
    file.write_text("one")
    assert run_key(configuration, [file, directory]) == key
    (directory / "deep" / "b.txt").rename(directory / "deep" / "c.txt")
    others.add(run_key(configuration, [file, directory]))
    assert len(others) == 5 and key not in others
    with pytest.raises(ValueError, match=r"missing: not there; run the stage that makes it first"):
        run_key(configuration, [tmp_path / "missing"])


def test_remembered_digests_give_the_same_key_and_notice_every_change(tmp_path, monkeypatch):
    file, cache = tmp_path / "a.txt", tmp_path / "cache" / "digests.json"
    file.write_text("one")
    plain = run_key({}, [file])
    assert run_key({}, [file], cache) == plain
    monkeypatch.setattr("elastic_core.io.digests.file_digest", lambda path: pytest.fail("read again"))
    assert run_key({}, [file], cache) == plain
    monkeypatch.undo()
    time.sleep(0.02)
    file.write_text("two")
    assert run_key({}, [file], cache) == run_key({}, [file]) != plain
    cache.write_text("{")
    assert run_key({}, [file], cache) == run_key({}, [file])
    file.unlink()
    shutil.copy(__file__, tmp_path / "b.py")
    run_key({}, [tmp_path / "b.py"], cache)
    assert list(json.loads(cache.read_text())) == [str(tmp_path / "b.py")]  # files that are gone are forgotten
