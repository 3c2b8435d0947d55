"""What torch.compile makes of a model's layers as a GPU would have them: how often a graph is split."""

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from benchmarks.shapes import Shape, random_model
from elastic_core.model.ops import kernels
from elastic_core.training.distributed.placement import compile_blocks

pytestmark = [pytest.mark.cuda_path, pytest.mark.thorough]


def graph_breaks(monkeypatch) -> int:
    """Compile and run a small hybrid in bfloat16, with kernels asked for as on a GPU; the number of splits."""
    model = random_model(Shape("tiny", 16, "M-*", 32, 8, 1, head=8).config(), 0)
    kernels.look_up()
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda part, **options: compile_for_count(part, options))
    compile_blocks(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.hidden_states(torch.arange(8)[None], model.slice()).float().sum().backward()
    return sum(counters["graph_break"].values())


def compile_for_count(part, options) -> None:
    """As nn.Module.compile, but graphs run as they are: to generate code would take minutes."""
    part._compiled_call_impl = torch.compile(part._call_impl, backend=lambda graph, inputs: graph.forward, **options)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "_has_kernels", lambda device, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(kernels, "_found", {})
    yield
    torch._dynamo.reset()


def test_without_kernels_no_graph_is_split(monkeypatch):
    for find in (kernels._causal_conv1d, kernels._mamba_scan, kernels._mamba_norm, kernels._mamba_layer):
        kernels._found[find.__name__] = "not installed here"
    assert graph_breaks(monkeypatch) == 0


def test_a_kernel_splits_a_graph_once(monkeypatch):
    """One layer with Mamba: its one kernel call is the only one."""

    @torch.compiler.disable
    def layer(projected, conv, bias, dt_bias, A, D, norm, sizes, documents):
        return projected[..., : len(norm)] * norm.to(projected.dtype)

    kernels._found |= {"_mamba_layer": layer} | dict.fromkeys(("_causal_conv1d", "_mamba_scan", "_mamba_norm"), "none")
    assert graph_breaks(monkeypatch) == 1
