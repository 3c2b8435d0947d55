"""A file that is no YAML: one line that names the file, and line and column where there are any."""

import contextlib

import pytest

from elastic_core.config import ConfigError
from tasks.settings.load import read, read_file
from tasks.settings.merging import parameters
from tests.support.pipeline.command_line import error_of

BAD = {
    "indent": (b"seed: 0\nrank:\n  batches: 3\n batch_size: 4\n", ", line 4, column "),
    "tab": (b"rank:\n\tbatches: 3\n", r", line 2, column 1: not valid YAML: .*; indent with spaces, not with tabs"),
    "duplicate": (b"seed: 0\nrank: {}\nseed: 1\n", r", line 3, column 1: .*duplicate key \"seed\"; keep one of them"),
    "duplicate inside": (b"rank: {batches: 1, batches: 2}\n", r", line 1, column 20: .*duplicate key \"batches\""),
    "open": (b"budgets: [1\n", r", line 2, column 1: not valid YAML"),
    "colon": (b"seed: 0: 1\n", r", line 1, column 8: not valid YAML"),
    "anchor": (b"seed: *nothing\n", r", line 1, column 7: not valid YAML"),
    "tag": (b"seed: !!python/object:os.system 1\n", r", line 1, column 7: not valid YAML"),
    "two documents": (b"seed: 0\n---\nseed: 1\n", r", line 2, column 1: not valid YAML"),
    "latin-1": ("seed: 0  # Größe\n".encode("latin-1"), r", line 1, column 14: not valid UTF-8"),
    "binary": (b"seed: 0\n\x00\x01", r": not valid YAML"),
    "list": (b"- seed\n- rank\n", r": got a list; allowed: a section with keys"),
    "text": (b"seed\n", r": got 'seed'; allowed: a section with keys"),
    "date": (b"seed: 2026-13-45\n", r": not valid YAML"),
}


@pytest.mark.parametrize("name", BAD)
def test_params_yaml(tmp_path, monkeypatch, name):
    content, words = BAD[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^params\.yaml{words}") as caught:
        read_file()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_an_empty_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in ("", "# nothing\n", "---\n"):
        (tmp_path / "params.yaml").write_text(content)
        with pytest.raises(ConfigError, match=r"^params\.yaml: is empty; allowed: sections with keys$"):
            read_file()


@pytest.mark.parametrize("name", BAD)
def test_a_profile(tmp_path, name):
    content, words = BAD[name]
    (tmp_path / "profiles").mkdir()
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    (tmp_path / "profiles" / "own.yaml").write_bytes(content)
    if name in ("tag", "date"):  # kept as they are, and refused with the values
        with contextlib.suppress(ConfigError):
            read(parameters("own", tmp_path))
        return
    with pytest.raises(ConfigError, match=rf"^profiles/own\.yaml{words}") as caught:
        parameters("own", tmp_path)
    assert "\n" not in str(caught.value)


def test_the_command_line_ends_with_one_line(tmp_path, monkeypatch):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "params.yaml").write_bytes(BAD["tab"][0])
    monkeypatch.setattr("tasks.settings.merging.parameters.__defaults__", ("default", tmp_path, None, ()))
    assert error_of("plan").startswith("error: params.yaml, line 2, column 1: not valid YAML")
