"""Which way the operations of a Mamba-2 layer take, and what is said about it. What the kernels compute is for a GPU.

Stand-ins for the packages say only that they were called: benchmarks/gpu.py compares the real ones.
"""

import logging
import sys
import types

import pytest
import torch

from elastic_core.model.ops import kernels
from tests.support.models.parents import random_elastic, random_ids, relative_error

GPU, CPU, BFLOAT16 = torch.device("cuda", 0), torch.device("cpu"), torch.bfloat16


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Every test looks anew, and no module of the packages is left behind."""
    monkeypatch.setattr(kernels, "_found", {})
    kernels._warn.cache_clear()
    names = [name for name in sys.modules if name.split(".")[0] in ("mamba_ssm", "causal_conv1d")]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("mamba_ssm", "causal_conv1d"):
            del sys.modules[name]
    kernels._warn.cache_clear()


def install(directory, monkeypatch, package_init: str) -> None:
    """Packages of the real ones' layout, whose functions return what they were called with."""
    triton = directory / "mamba_ssm" / "ops" / "triton"
    triton.mkdir(parents=True)
    (directory / "mamba_ssm" / "__init__.py").write_text(package_init)
    for package in (triton.parent, triton):
        (package / "__init__.py").touch()
    echo = "def {}(*args, **kwargs):\n    return '{}', args, kwargs\n"
    (triton / "ssd_combined.py").write_text(echo.format(*["mamba_chunk_scan_combined"] * 2))
    (triton / "layernorm_gated.py").write_text(echo.format(*["rmsnorm_fn"] * 2))
    monkeypatch.syspath_prepend(str(directory))


def test_nothing_is_looked_for_on_a_cpu_or_for_float32(caplog):
    def find():
        raise AssertionError("was looked for")

    with caplog.at_level(logging.WARNING):
        assert kernels._kernel(find, CPU, BFLOAT16) is None
        assert kernels._kernel(find, GPU, torch.float32) is None
    assert not caplog.records


def test_a_slow_way_on_a_gpu_is_said_once_with_its_reason(caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)  # as if it were not installed
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert kernels._kernel(kernels._mamba_scan, GPU, BFLOAT16) is None
    (record,) = caplog.records
    assert "mamba_scan" in record.message and "pip install mamba-ssm" in record.message
    caplog.clear()
    for _ in range(2):
        assert kernels._kernel(lambda: len, GPU, BFLOAT16, "12 channels") is None
    (record,) = caplog.records
    assert "12 channels" in record.message


@pytest.mark.parametrize("package_init", ["", "import selective_scan_cuda_that_is_not_built"])
def test_mamba_is_found_with_and_without_its_cuda_extension(tmp_path, monkeypatch, caplog, package_init):
    install(tmp_path, monkeypatch, package_init)
    with caplog.at_level(logging.WARNING):
        scan = kernels._kernel(kernels._mamba_scan, GPU, BFLOAT16)
        norm = kernels._kernel(kernels._mamba_norm, GPU, BFLOAT16)
    assert not caplog.records
    keywords = {"chunk_size": 128, "D": 6, "seq_idx": 7}
    assert scan(1, 2, 3, 4, 5, 6, 7) == ("mamba_chunk_scan_combined", (1, 2, 3, 4, 5), keywords)
    name, args, keywords = norm(1, 2, 3, 1e-5, 8)
    assert name == "rmsnorm_fn" and args == (1, 3, None)
    assert keywords == {"z": 2, "eps": 1e-5, "group_size": 8, "norm_before_gate": False}


def test_an_absent_package_is_not_replaced(monkeypatch):
    if sys.modules.get("mamba_ssm") is None and kernels.importlib.util.find_spec("mamba_ssm") is not None:
        pytest.skip("mamba_ssm is installed here")
    assert "mamba-ssm" in kernels.missing()["scan"]
    assert "mamba_ssm" not in sys.modules


def test_the_convolution_takes_its_kernel_or_says_what_does_not_fit(monkeypatch, caplog):
    package = types.ModuleType("causal_conv1d")
    package.causal_conv1d_fn = lambda *args, **keywords: (args, keywords)
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    (x, weight, bias), keywords = kernels._kernel(kernels._causal_conv1d, GPU, BFLOAT16)(1, 2, None, 7)
    assert (x, weight, bias, keywords) == (1, 2, None, {"activation": "silu", "seq_idx": 7})


def test_slices_are_copied_only_where_the_kernel_could_not_read_them():
    wide = torch.zeros(2, 5, 48)
    for start, stop, kept in ((0, 16, True), (8, 24, True), (4, 20, False)):
        part = wide[..., start:stop]
        aligned = kernels._aligned(part)
        assert torch.equal(aligned, part) and (aligned.data_ptr() == part.data_ptr()) == kept
    assert kernels._aligned(torch.zeros(2, 5, 42)[..., :16]).stride() == (80, 16, 1)
    assert kernels._aligned(torch.zeros(1, 1, 42)[..., :16]).stride() == (16, 16, 1)  # one token, which is contiguous


def test_a_16_bit_layer_computes_its_scan_and_norm_in_float32(monkeypatch):
    """What the torch way is given in bfloat16: inputs widened, and the layer's own type back."""
    seen = []
    scan = kernels.ssd
    monkeypatch.setattr(kernels, "ssd", lambda *args, starts: seen.append({t.dtype for t in args}) or scan(*args))
    model = random_elastic(0).to(BFLOAT16)
    ids = random_ids(model.config, 0)
    with torch.no_grad():
        logits = model(ids)
    assert seen and all(types == {torch.float32} for types in seen)
    assert logits.dtype == BFLOAT16
    with torch.no_grad():
        assert relative_error(logits.float(), random_elastic(0)(ids)) < 0.1
