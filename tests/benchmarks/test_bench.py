"""benchmarks/bench.py with small shapes: every section runs, misses no goal that small shapes have, and cleans up."""

import tempfile

import pytest

from benchmarks import bench


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs sections with small shapes in this process; returns the table that was printed."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def call(*sections):
        monkeypatch.setattr("sys.argv", ["bench", *sections, "--quick"])
        with pytest.raises(SystemExit) as end:
            bench.main()
        printed = capsys.readouterr().out
        assert not end.value.code and "| fail" not in printed, printed
        assert not list(tmp_path.iterdir())
        return printed

    return call


@pytest.mark.thorough
def test_small_shapes_of_steps_scan_and_losses(run):
    printed = run("steps", "scan", "losses")
    for check in (
        "hard pass against masks",
        "soft pass",
        "whole step",
        "documents against",
        "scan = transformers'",
        "chunked loss = whole",
    ):
        assert f"| {check}" in printed


@pytest.mark.thorough
def test_small_shapes_of_ranking_and_of_all_that_reads_and_writes(run):
    printed = run("ranking", "extraction", "preparation", "checkpoints")
    for check in ("ranking, time", "extraction, memory", "loading, memory", "preparation, memory", "training blocked"):
        assert f"{check} " in printed
    assert printed.count("| pass") >= 5


def test_small_shapes_of_serving(run):
    printed = run("serving", "server")
    assert printed.count("greedy tokens") == printed.count("| pass") == 3
    assert printed.count("8 concurrent requests") == 1
