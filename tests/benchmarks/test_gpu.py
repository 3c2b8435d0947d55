"""benchmarks/gpu.py on a CPU: its checks pass, its files say so, and what is broken is seen."""

import json

import pytest
import torch

from benchmarks import gpu, report


def run(*arguments, monkeypatch):
    """The exit status of the benchmark."""
    monkeypatch.setattr("sys.argv", ["gpu", *arguments])
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which it would set for all tests after this one
    with pytest.raises(SystemExit) as end:
        gpu.main()
    return end.value.code


@pytest.mark.thorough
def test_the_small_run_passes_and_says_what_it_did_not_measure(tmp_path, monkeypatch, capsys):
    assert run("--device", "cpu", "--small", "--out", str(tmp_path), monkeypatch=monkeypatch) == 0
    (path,) = tmp_path.glob("cpu*-small.json")
    content = json.loads(path.read_text())
    rows = [report.Row(**row) for row in content["rows"]]
    assert content["environment"]["torch"] == torch.__version__
    assert report.table(rows) in capsys.readouterr().out
    status = {(row.check, row.what): row.status for row in rows}
    assert report.FAIL not in status.values()
    assert status["resume", "weights and moments after the next step"] == report.PASS
    assert sum(row.status == report.PASS for row in rows) == 22
    assert status["execution = plain", "compile, bfloat16"] == report.NOT_MEASURED
    for name in ("scan", "convolution", "gated norm"):
        assert status["kernel = torch", f"{name}, output and gradients"] == report.NOT_MEASURED
    assert status["step", "1.2 B, 49,152 tokens of context"] == report.NOT_MEASURED


def test_deviations_and_bounds():
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2)}
    assert gpu.deviation(one, one) == 0
    assert gpu.deviation({**one, "a": torch.tensor([1.0, 2.1])}, one) > 0.04
    assert gpu.deviation({"a": one["a"]}, one) == float("inf")  # a gradient too few
    broken = gpu.deviation({**one, "b": torch.tensor([0.0, torch.nan])}, one)
    assert report.within("check", "what", broken, 1.0).status == report.FAIL
    assert report.within("check", "what", 0.1, 0.1).status == report.PASS
    assert report.holds("check", "what", False).status == report.FAIL
    assert report.measured("check", "what", "1 ms").status == report.MEASURED


def test_a_failed_check_ends_with_an_error(tmp_path, monkeypatch, capsys):
    rows = [report.within("check", "what", 1.0, 0.1)]
    monkeypatch.setattr(gpu, "run", lambda device, small, minutes: ({"device": "a GPU / 80GB"}, rows))
    assert run("--device", "cpu", "--out", str(tmp_path), monkeypatch=monkeypatch) == 1
    assert "fail" in capsys.readouterr().out and (tmp_path / "a-GPU-80GB.json").is_file()


def test_kernels_are_imported_before_deterministic_algorithms_are_switched_on(monkeypatch):
    seen = []
    monkeypatch.setattr(gpu.fast_kernels, "missing", lambda: seen.append(torch.are_deterministic_algorithms_enabled()))
    try:
        gpu.start_deterministic(torch.device("cuda"))
        assert seen == [False] and torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_is_begun_after_the_deadline(capsys):
    begun = []

    def rows():
        for number in range(3):
            begun.append(number)
            yield report.measured("check", str(number), "1 ms")

    assert [row.status for row in gpu.show(rows(), deadline=0.0)] == [report.MEASURED, report.NOT_MEASURED]
    assert begun == [0]
