"""Files and directories appear complete or not at all, also when the writing block fails or the process is killed."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_core.errors import UserError
from elastic_core.io.atomic import check_apart, check_out, create_file, whole_directory, whole_file, write_text

ROOT = Path(__file__).resolve().parents[3]
FAILURES = [RuntimeError, KeyboardInterrupt]


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


# Files


def test_a_file_appears_complete_and_its_directory_is_made(tmp_path):
    target = tmp_path / "deep" / "er" / "file"
    with whole_file(target) as partial:
        partial.write_text("new")
        assert partial.parent == target.parent and not target.exists()
    assert target.read_text() == "new" and names_in(target.parent) == ["file"]
    with whole_file(str(target)) as partial:
        partial.write_text("newer")
        assert target.read_text() == "new"
    assert target.read_text() == "newer" and names_in(target.parent) == ["file"]


@pytest.mark.parametrize("problem", [None, errno.EPERM, errno.EIO])
def test_a_new_file_is_created_whole_and_once(tmp_path, monkeypatch, problem):
    """Also where the file system has no hard links."""

    def link(source, target):
        assert source.read_bytes() == b"whole" and not target.exists()
        raise OSError(problem, os.strerror(problem))

    target = tmp_path / "new" / "file"
    if problem is not None:
        monkeypatch.setattr(os, "link", link)
    if problem == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            create_file(target, b"whole")
        assert names_in(target.parent) == []
        return
    create_file(target, b"whole")
    monkeypatch.undo()
    with pytest.raises(FileExistsError):
        create_file(target, b"other")
    assert target.read_bytes() == b"whole" and names_in(target.parent) == ["file"]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_block_keeps_the_old_file(tmp_path, existing, failure):
    target = tmp_path / "file"
    if existing:
        target.write_text("old")
    with pytest.raises(failure), whole_file(target) as partial:
        partial.write_text("half of the n")
        raise failure
    assert names_in(tmp_path) == (["file"] if existing else [])
    assert not existing or target.read_text() == "old"


def test_a_block_that_writes_nothing_keeps_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "old"


def test_text_is_written_in_utf_8(tmp_path):
    """Whatever the locale says."""
    code = f"from elastic_core.io.atomic import write_text; write_text({str(tmp_path / 'text')!r}, {'µ → é'!a})"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)
    assert (tmp_path / "text").read_bytes() == "µ → é".encode()
    write_text(tmp_path / "text", "other")
    assert (tmp_path / "text").read_text() == "other" and names_in(tmp_path) == ["text"]


# Directories


def write_version(directory, text):
    with whole_directory(directory) as partial:
        (partial / "config.json").write_text(text)


def version(directory):
    return (directory / "config.json").read_text()


def test_a_directory_appears_complete(tmp_path):
    out = tmp_path / "deep" / "out"
    with whole_directory(str(out)) as partial:
        (partial / "a").write_text("a")
        (partial / "sub").mkdir()
        assert partial.parent == out.parent and not out.exists()
    assert names_in(out) == ["a", "sub"] and names_in(out.parent) == ["out"]


def test_an_earlier_directory_is_replaced_and_nothing_of_it_stays(tmp_path):
    out = tmp_path / "out"
    write_version(out, "old")
    (out / "only of the old one").write_text("x")
    write_version(out, "new")
    assert version(out) == "new" and names_in(out) == ["config.json"] and names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_link_stays_and_the_directory_behind_it_is_replaced(tmp_path, existing):
    if existing:
        write_version(tmp_path / "disk" / "model", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    for text in ("new", "newer"):
        write_version(tmp_path / "link", text)
        assert version(tmp_path / "disk" / "model") == text and (tmp_path / "link").is_symlink()
    assert names_in(tmp_path) == ["disk", "link"] and names_in(tmp_path / "disk") == ["model"]


@pytest.mark.parametrize("name", [".", "sub/.."])
def test_a_directory_without_a_name_of_its_own_is_written(tmp_path, monkeypatch, name):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    write_version(name, "new")
    assert version(tmp_path / "out") == "new" and names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("marker", ["config.json", "manifest.json"])
def test_only_a_directory_with_the_marker_or_an_empty_one_is_replaced(tmp_path, marker):
    for name in ("marked", "other", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "marked" / marker).write_text("{}")
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("other", "file"):
        words = rf"{name}: exists and has no {marker}; name another directory, or remove it"
        with pytest.raises(UserError, match=words), whole_directory(tmp_path / name, marker):
            pytest.fail("the block was entered")
    assert names_in(tmp_path) == ["empty", "file", "marked", "other"]
    assert (tmp_path / "other" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "a file"
    for name in ("marked", "empty", "not there yet"):
        with whole_directory(tmp_path / name, marker) as partial:
            (partial / "new").write_text("")
        assert names_in(tmp_path / name) == ["new"]


def test_without_a_marker_any_directory_is_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    with whole_directory(tmp_path / "out", marker=None) as partial:
        (partial / "new").write_text("")
    assert names_in(tmp_path / "out") == ["new"] and names_in(tmp_path) == ["out"]


def test_a_command_replaces_a_model_if_told_to_and_nothing_else(tmp_path):
    for name in ("model", "other", "empty"):
        (tmp_path / name).mkdir()
    write_version(tmp_path / "model", "old")
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("empty", "not there yet"):
        check_out(tmp_path / name, force=False)
    for name in ("model", "other", "link"):
        with pytest.raises(UserError, match=rf"{name}: exists; name another directory, or replace it with --force"):
            check_out(tmp_path / name, force=False)
    check_out(tmp_path / "model", force=True)
    with pytest.raises(UserError, match=r"other: exists and has no config\.json"):
        check_out(tmp_path / "other", force=True)


def test_what_is_replaced_is_apart_from_what_is_read(tmp_path):
    source = tmp_path / "in" / "source"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    for name in ("in", "in/source", "in/source/sub", "in/../link", "link/sub", "."):
        with pytest.raises(UserError, match=r"(source or contains it|lies in .*source); name another directory"):
            check_apart(tmp_path / name, [tmp_path.parent / "other", source])
    for name in ("in/source-2", "in/other", "out"):
        check_apart(tmp_path / name, [tmp_path.parent / "other", source])


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_block_keeps_the_old_directory(tmp_path, existing, failure):
    out = tmp_path / "out"
    if existing:
        write_version(out, "old")
    with pytest.raises(failure), whole_directory(out) as partial:
        (partial / "config.json").write_text("half of the n")
        raise failure
    assert names_in(tmp_path) == (["out"] if existing else [])
    assert not existing or version(out) == "old"
    write_version(out, "new")  # and nothing prevents the next attempt
    assert version(out) == "new"


def test_at_every_moment_of_a_replacement_one_complete_directory_is_there(tmp_path, monkeypatch):
    """A kill before or after any rename or removal leaves the old or the new one, under its name or set aside."""
    out, moments = tmp_path / "out", []
    write_version(out, "old")

    def watched(function):
        def call(*arguments, **values):
            moments.append({path.parent.name: path.read_text() for path in tmp_path.glob("*/config.json")})
            return function(*arguments, **values)

        return call

    monkeypatch.setattr(os, "replace", watched(os.replace))
    monkeypatch.setattr(shutil, "rmtree", watched(shutil.rmtree))
    write_version(out, "new")
    assert len(moments) >= 4 and version(out) == "new"
    assert all({"out", ".out.earlier"} & set(moment) for moment in moments)
    assert names_in(tmp_path) == ["out"]


KILLED_REPLACEMENT = """
import os, sys
from elastic_core.io.atomic import whole_directory
replace, calls, moment = os.replace, [], int(sys.argv[2])

def replace_or_die(*arguments):
    replace(*arguments)
    calls.append(arguments)
    if len(calls) == moment:
        os._exit(9)

os.replace = replace_or_die
with whole_directory(sys.argv[1]) as partial:
    (partial / "config.json").write_text("new")
    if moment == 0:
        os._exit(9)
"""


@pytest.mark.parametrize(
    ("moment", "left", "now"),
    [
        (0, [".out.partial", "out"], "old"),  # while the new one is written
        (1, [".out.earlier", ".out.partial"], "old"),  # the old one is set aside, the new one has no name yet
        (2, [".out.earlier", "out"], "new"),  # the new one has its name
        (3, [".out.partial", "out"], "new"),  # while the old one is deleted
    ],
)
def test_the_next_call_repairs_what_a_killed_process_left(tmp_path, moment, left, now):
    """The process ends at once, without any `finally`, after the given number of renames."""
    out = tmp_path / "out"
    write_version(out, "old")
    command = [sys.executable, "-c", KILLED_REPLACEMENT, str(out), str(moment)]
    assert subprocess.run(command, cwd=ROOT).returncode == 9
    assert names_in(tmp_path) == left
    with pytest.raises(KeyboardInterrupt), whole_directory(out) as partial:
        assert version(out) == now and names_in(partial) == []  # before anything new is written
        raise KeyboardInterrupt
    assert version(out) == now and names_in(tmp_path) == ["out"]
    write_version(out, "newest")
    assert version(out) == "newest" and names_in(tmp_path) == ["out"]
