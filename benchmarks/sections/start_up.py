"""How long it takes until something is said: the command line's help, and a run in which nothing is left to do."""

import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.comparison import ROOT, in_turn
from benchmarks.report import FAIL, PASS, Row, not_measured
from flows.process.output import environment

HELP_SECONDS, REPRO_SECONDS = 1.0, 5.0
REPEATS = 5


def rows(quick: bool) -> Iterator[Row]:
    repeats = 1 if quick else REPEATS
    yield seconds(
        "start-up", "elastic --help", [sys.executable, "-m", "flows.cli", "--help"], ROOT, repeats, HELP_SECONDS
    )
    yield repro(repeats)


def repro(repeats: int) -> Row:
    """`dvc repro` where a run has finished: of the default parameters, or of the smoke profile."""
    dvc = [sys.executable, "-m", "dvc", "repro"]
    for workspace in (ROOT, ROOT / ".runs" / "smoke"):
        if (workspace / "dvc.lock").is_file() and (workspace / "artifacts").is_dir():
            dry = subprocess.run([*dvc, "--dry"], cwd=workspace, env=environment(), capture_output=True, text=True)
            if dry.returncode == 0 and "up to date" in dry.stdout:
                return seconds("start-up", "dvc repro, nothing to do", dvc, workspace, repeats, REPRO_SECONDS)
    return not_measured("start-up", "dvc repro, nothing to do", "no finished run here: `make run PROFILE=smoke` first")


def seconds(check: str, what: str, command: list[str], directory: Path, repeats: int, bound: float) -> Row:
    def take() -> None:
        subprocess.run(command, cwd=directory, env=environment(), capture_output=True, check=True)

    value = statistics.median(in_turn({"": take}, repeats)[""])
    return Row(check, what, f"{value:.2f} s", f"≤ {bound:g} s", PASS if value <= bound else FAIL)
