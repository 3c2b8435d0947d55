"""Fast operations against their naive twins and against torch: outputs and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from elastic_core.model.ops.activation import OWN, activation, activation_requirement, relu_squared
from elastic_core.model.ops.conv import causal_conv
from elastic_core.model.ops.norm import group_rms_norm, rms_norm, rms_norm_naive
from elastic_core.model.ops.ssd import ssd, ssd_naive
from tests.support.models.parents import relative_error

SHAPES = [  # batch, length, heads, channels, groups, state size, chunk size
    (1, 1, 1, 1, 1, 1, 1),
    (2, 1, 4, 3, 2, 5, 8),
    (2, 7, 6, 3, 3, 5, 8),
    (1, 8, 4, 5, 4, 3, 8),
    (2, 9, 4, 5, 1, 3, 8),
    (3, 29, 6, 2, 2, 7, 5),
    (1, 131, 2, 3, 1, 2, 64),
]


def draw(shape, seed, dtype, decay):
    batch, length, heads, channels, groups, states, _ = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x, B, C = normal(batch, length, heads, channels), *(normal(batch, length, groups, states) for _ in range(2))
    dt, A, D = F.softplus(normal(batch, length, heads)), -normal(heads).exp(), normal(heads)
    if decay != "mild":  # A·dt from 1e-6 to 1e3, side by side in one chunk
        dt = 10 ** (torch.rand(dt.shape, generator=generator, dtype=torch.float64) * 9 - 6)
        A = -torch.ones_like(A)
    if decay == "strong A":
        dt, A = dt / 1e3, 1e3 * A
    return [t.to(dtype) for t in (x, dt, A, B, C, D)]


def values_and_gradients(function, inputs, weights):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)]


@pytest.mark.parametrize("decay", ["mild", "strong A", "strong dt"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [1, 500, None])  # a chunk at a time, a few, all
def test_ssd_equals_the_recurrence(shape, dtype, tolerance, decay, block):
    inputs = draw(shape, 0, dtype, decay)
    weights = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fast = values_and_gradients(lambda *t: ssd(*t, shape[-1], block), inputs, weights.to(dtype))
    exact = values_and_gradients(ssd_naive, [t.double() for t in inputs], weights)
    for name, value, reference in zip(("y", "x", "dt", "A", "B", "C", "D"), fast, exact, strict=True):
        assert value.dtype == dtype and torch.isfinite(value).all(), name
        # Relative to the largest entry; the clamp is for gradients that vanish (A's at length 1), which are rounding.
        # Float64 loses the four digits that a sum of decays up to 1e5 takes from it.
        scale = reference.abs().max().clamp(min=1e-2)
        assert (value.double() - reference).abs().max() / scale < tolerance, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [1, 500, None])
def test_no_state_passes_the_start_of_a_document(shape, dtype, tolerance, block):
    inputs = draw(shape, 0, dtype, "mild")
    starts = torch.rand(shape[:2], generator=torch.Generator().manual_seed(2)) < 0.3
    weights = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fast = values_and_gradients(lambda *t: ssd(*t, shape[-1], block, starts), inputs, weights.to(dtype))
    exact = values_and_gradients(lambda *t: ssd_naive(*t, starts), [t.double() for t in inputs], weights)
    for name, value, reference in zip(("y", "x", "dt", "A", "B", "C", "D"), fast, exact, strict=True):
        scale = reference.abs().max().clamp(min=1e-2)
        assert (value.double() - reference).abs().max() / scale < tolerance, name


def test_ssd_naive_by_hand():
    """One head, one channel, two positions, two groups: the equations, written out."""
    x = torch.tensor([[[[2.0], [3.0]], [[5.0], [7.0]]]], dtype=torch.float64)  # (1, 2, 2, 1)
    dt = torch.tensor([[[0.1, 0.2], [0.3, 0.4]]], dtype=torch.float64)
    A, D = torch.tensor([-1.0, -2.0], dtype=torch.float64), torch.tensor([0.5, 0.25], dtype=torch.float64)
    B = torch.tensor([[[[1.0], [10.0]], [[2.0], [20.0]]]], dtype=torch.float64)  # group 0 is head 0's, 1 is head 1's
    C = torch.tensor([[[[3.0], [30.0]], [[4.0], [40.0]]]], dtype=torch.float64)
    h0 = [0.1 * 1 * 2, 0.2 * 10 * 3]
    h1 = [
        torch.tensor(-0.3, dtype=torch.float64).exp() * h0[0] + 0.3 * 2 * 5,
        torch.tensor(-0.8, dtype=torch.float64).exp() * h0[1] + 0.4 * 20 * 7,
    ]
    expected = [[3 * h0[0] + 0.5 * 2, 30 * h0[1] + 0.25 * 3], [4 * h1[0] + 0.5 * 5, 40 * h1[1] + 0.25 * 7]]
    expected = torch.tensor(expected, dtype=torch.float64)
    for function in (ssd_naive, ssd, lambda *t: ssd(*t, chunk=1)):
        assert relative_error(function(x, dt, A, B, C, D)[0, :, :, 0], expected) < 1e-14


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("length", "kernel"), [(1, 4), (3, 4), (17, 4), (5, 1), (9, 2)])
def test_causal_conv_equals_torch(length, kernel, bias):
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 1, kernel, generator=generator, dtype=torch.float64)
    inputs = [x, weight] + ([torch.randn(6, generator=generator, dtype=torch.float64)] if bias else [])
    weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)

    def torch_conv(x, weight, bias=None):
        y = F.conv1d(x.transpose(1, 2), weight, bias, padding=kernel - 1, groups=6)
        return y[..., :length].transpose(1, 2)

    ours = values_and_gradients(lambda x, w, b=None: causal_conv(x, w, b), inputs, weights)
    for value, reference in zip(ours, values_and_gradients(torch_conv, inputs, weights), strict=True):
        assert relative_error(value, reference) < 1e-13


@pytest.mark.parametrize(("length", "kernel"), [(3, 4), (17, 4), (17, 9), (5, 1), (9, 2)])
def test_the_convolution_does_not_reach_over_the_start_of_a_document(length, kernel):
    """Each document is convolved alone by torch; some are shorter than the kernel."""
    generator = torch.Generator().manual_seed(length)
    x, weights = torch.randn(2, 2, length, 6, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(6, 1, kernel, generator=generator, dtype=torch.float64), weights[0, 0]
    is_start = torch.rand(2, length, generator=generator) < 0.4
    is_start[:, 0] = False
    starts = is_start.flatten().nonzero().flatten()

    def each_alone(x, weight, bias):
        rows = []
        for row, starting in zip(x, is_start, strict=True):
            parts = row.tensor_split(starting.nonzero().flatten().tolist())
            rows.append(torch.cat([causal_conv(part[None], weight, bias)[0] for part in parts]))
        return torch.stack(rows)

    ours = values_and_gradients(lambda *t: causal_conv(*t, starts), [x, weight, bias], weights)
    for value, reference in zip(ours, values_and_gradients(each_alone, [x, weight, bias], weights), strict=True):
        assert relative_error(value, reference) < 1e-13


def test_rms_norm_equals_torch():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((3, 5, 12), (12,)))
    weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    ours = values_and_gradients(lambda x, w: rms_norm(x, w, 1e-3, 12), [x, weight], weights)
    torchs = values_and_gradients(lambda x, w: F.rms_norm(x, (12,), w, 1e-3), [x, weight], weights)
    for value, reference in zip(ours, torchs, strict=True):
        assert relative_error(value, reference) < 1e-13
    grouped = values_and_gradients(lambda x, w: group_rms_norm(x, w, 1e-3, 3, 4), [x, weight], weights)
    split = values_and_gradients(
        lambda x, w: torch.cat(
            [F.rms_norm(p, (4,), q, 1e-3) for p, q in zip(x.split(4, -1), w.split(4), strict=True)], -1
        ),
        [x, weight],
        weights,
    )
    for value, reference in zip(grouped, split, strict=True):
        assert relative_error(value, reference) < 1e-13


@pytest.mark.parametrize("count", [8, torch.tensor(8.0)])
def test_norms_of_dead_channels_are_norms_of_the_live_ones(count):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 12, generator=generator), torch.randn(12, generator=generator)
    x[:, 8:] = 0
    assert relative_error(rms_norm(x, weight, 1e-3, count)[:, :8], F.rms_norm(x[:, :8], (8,), weight[:8], 1e-3)) < 1e-6
    assert rms_norm(x, weight, 1e-3, count)[:, 8:].abs().max() == 0


@pytest.mark.parametrize("groups", [1, 3])
def test_rms_norm_and_the_gradient_of_the_live_count_equal_the_naive_form(groups):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((2, 5, 12), (12,)))
    live, weights = torch.tensor(3.7, dtype=torch.float64), torch.randn(x.shape, generator=generator).double()

    def naive(x, weight, live):
        x, weight = x.unflatten(-1, (groups, -1)), weight.view(groups, -1)
        return rms_norm_naive(x, weight, 1e-3, live).flatten(-2)

    inputs = [x, weight, live]
    ours = values_and_gradients(lambda x, w, n: group_rms_norm(x, w, 1e-3, groups, n), inputs, weights)
    for value, reference in zip(ours, values_and_gradients(naive, inputs, weights), strict=True):
        assert value.shape == reference.shape and relative_error(value, reference) < 1e-13


def test_relu_squared_equals_its_two_operations():
    x, weights = torch.randn(2, 3, 7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = values_and_gradients(relu_squared, [x], weights)
    for value, reference in zip(ours, values_and_gradients(lambda x: F.relu(x) ** 2, [x], weights), strict=True):
        assert relative_error(value, reference) < 1e-15


@pytest.mark.parametrize("name", OWN)
def test_activations_without_an_import_of_transformers_equal_its_own(name):
    x, weights = torch.randn(2, 3, 7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = values_and_gradients(activation(name), [x], weights)
    for value, reference in zip(ours, values_and_gradients(ACT2FN[name], [x], weights), strict=True):
        assert relative_error(value, reference) < 1e-15


def test_other_activations_are_those_of_transformers():
    for name in ACT2FN:
        assert activation_requirement("hidden_act", name)[0]
    assert type(activation("gelu_new")) is type(ACT2FN["gelu_new"])
    holds, message = activation_requirement("hidden_act", "nothing")
    assert not holds and message == f"hidden_act='nothing'; allowed: {', '.join(sorted(ACT2FN))}"


def test_norms_compute_in_float32_and_return_the_input_type():
    x = torch.full((1, 4096), 3e4, dtype=torch.bfloat16)
    y = rms_norm(x, torch.ones(4096, dtype=torch.bfloat16), 1e-5, 4096)
    assert y.dtype == torch.bfloat16 and (y - 1).abs().max() < 1e-2
    half = torch.full((1, 64), 6e4, dtype=torch.float16)  # whose square float16 cannot hold
    assert torch.isfinite(group_rms_norm(half, torch.ones(64), 1e-5, 4, 16)).all()
