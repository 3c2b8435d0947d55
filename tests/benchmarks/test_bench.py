"""benchmarks/bench.py with small shapes: every section runs, misses no goal that small shapes have, and cleans up."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_small_shapes_of_steps_scan_and_losses():
    command = [sys.executable, "-m", "benchmarks.bench", "steps", "scan", "losses", "--quick"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    for check in ("hard pass against masks", "soft pass", "whole step", "scan = transformers'", "chunked loss = whole"):
        assert f"| {check}" in done.stdout
    assert "| fail" not in done.stdout


def test_small_shapes_of_ranking_and_of_all_that_reads_and_writes(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench",
        "ranking",
        "extraction",
        "preparation",
        "checkpoints",
        "--quick",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    for check in ("ranking, time", "extraction, memory", "loading, memory", "preparation, memory", "training blocked"):
        assert f"{check} " in done.stdout
    assert done.stdout.count("| pass") >= 5 and "| fail" not in done.stdout
    assert not list(tmp_path.glob("elastic-*"))
