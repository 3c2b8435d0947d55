"""DVC in a process of its own says nothing where all is well."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_a_stage_with_an_empty_file_is_brought_up_to_date_without_a_word(tmp_path):
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    (tmp_path / "dvc.yaml").write_text("stages:\n  empty: {cmd: touch metrics, outs: [metrics]}\n")
    command = [sys.executable, "-m", "flows.process.dvc_repro", "--events", "events"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert '"empty"' in (tmp_path / "events").read_text() and (tmp_path / "metrics").read_bytes() == b""
