"""`python -m tasks.settings`: the quick check of params.yaml."""

import os
import subprocess
import sys

from tests.support.committed_params import ROOT, put, write
from tests.support.pipeline.cpu_time import children_seconds


def check_quickly(directory, *profiles):
    """The ended process, and how many seconds of processor time it took."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    begin = children_seconds()
    done = subprocess.run(
        [sys.executable, "-m", "tasks.settings", *profiles],
        cwd=directory,
        env=variables,
        capture_output=True,
        text=True,
    )
    return done, children_seconds() - begin


def test_it_answers_within_a_second():
    """The best of three tries, in processor time: what it takes on a machine that does nothing else."""
    found = [check_quickly(ROOT) for _ in range(3)]
    for done, _ in found:
        assert (done.returncode, done.stdout, done.stderr) == (0, "params.yaml is valid\n", "")
    assert min(seconds for _, seconds in found) < 1


def test_it_ends_with_one_line_and_a_status(values, tmp_path, monkeypatch):
    put("train_short", "steps", "ten")(values)
    write(values, tmp_path, monkeypatch)
    done, _ = check_quickly(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: params.yaml: train_short.steps: got 'ten'; allowed: an integer\n"


def test_what_needs_the_parents_configuration_is_left_to_the_other_check(values, tmp_path, monkeypatch):
    put("budgets", "small", "9B")(values)
    write(values, tmp_path, monkeypatch)
    assert check_quickly(tmp_path)[0].returncode == 0


def test_profiles_are_checked_without_the_files_that_they_name(tmp_path):
    """Their parents and corpora are on other machines."""
    done, _ = check_quickly(tmp_path, "one-gpu", "nemotron-nano-12b-v2")
    lines = "profiles/one-gpu.yaml is valid\nprofiles/nemotron-nano-12b-v2.yaml is valid\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, lines, "")
    done, _ = check_quickly(tmp_path, "no-such-profile")
    assert done.returncode == 1 and "profile: got 'no-such-profile'; allowed: default" in done.stderr
