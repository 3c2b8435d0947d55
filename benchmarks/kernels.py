"""The operations of a Mamba-2 layer on this device: torch's scan against its recurrence, kernels against torch."""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import Row, measured, not_measured, within
from benchmarks.shapes import scan_inputs
from elastic_core.model.documents import Documents
from elastic_core.model.layers import causal_attention
from elastic_core.model.ops import kernels
from elastic_core.model.ops.conv import causal_conv_silu
from elastic_core.model.ops.norm import group_rms_norm
from elastic_core.model.ops.parts import Part, PartDocuments
from elastic_core.model.ops.ssd import ssd, ssd_naive

# Kernels read and write bfloat16, three digits; the gradients of A and D are sums of such numbers over all positions,
# and A's cancels. Against torch's float32; not tried yet.
TRITON = 5e-2
LAYER = 1e-1  # a whole layer rounds after the convolution, after the scan and after the norm
# heads, channels, groups, states: whole, and as slices leave them (heads per group and channels that are no power of 2)
COMPARED = ("scan", "convolution", "gated norm", "layer")
LAYERS = ((8, 64, 2, 64), (6, 40, 2, 64), (12, 80, 4, 128))


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative deviation of any tensor; inf where others have a gradient, nan where one is nan."""
    if found.keys() != expected.keys():
        return float("inf")
    scales = {name: value.abs().max().clamp(min=1e-12) for name, value in expected.items()}
    return torch.stack([(found[name] - expected[name]).abs().max() / scales[name] for name in expected]).max().item()


def both_passes(function: Callable, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Output of a function and the gradient of every input, for a fixed direction."""
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    y = function(*inputs)
    direction = torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype, device=y.device)
    (y * direction).sum().backward()
    return {"y": y.detach().float()} | {f"input {i}": value.grad.float() for i, value in enumerate(inputs)}


def measure(device: torch.device, bound: float) -> Iterator[Row]:
    """All rows; `bound` is float32's rounding."""
    is_gpu = device.type == "cuda"
    inputs = scan_inputs(device, 300 if is_gpu else 75)
    exact = both_passes(ssd_naive, tuple(value.double() for value in inputs))
    for chunk in (32, 128):
        found = both_passes(functools.partial(ssd, chunk=chunk), inputs)
        yield within("scan = recurrence", f"output and gradients, chunk {chunk}", deviation(found, exact), bound)
    missing = kernels.missing() if is_gpu else dict.fromkeys(COMPARED, "on GPUs only")
    for name, compare in zip(COMPARED, (scans, convolutions, norms, layers), strict=True):
        if name in missing:
            yield not_measured("kernel = torch", f"{name}, output and gradients", missing[name])
            continue
        for layer in LAYERS:
            heads, channels, groups, states = layer
            what = f"{name}, {heads} heads of {channels}, {groups} groups, state {states}: output and gradients"
            yield within("kernel = torch", what, compare(device, *layer), LAYER if name == "layer" else TRITON)
    if is_gpu:
        yield measured(
            "kernels", "taken by training in bfloat16", ", ".join(missing) + " missing" if missing else "all"
        )


def rounded(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What bfloat16 can hold, as float32, so that both ways begin at the same numbers."""
    return tuple(value.bfloat16().float() for value in values)


def scans(device: torch.device, heads: int, channels: int, groups: int, states: int) -> float:
    inputs = scan_inputs(device, 300, heads, channels, groups, states)
    x, B, C = rounded((inputs[0], inputs[3], inputs[4]))
    inputs = x, inputs[1], inputs[2], B, C, inputs[5]
    fast = both_passes(lambda *values: kernels.scan(*values, torch.bfloat16), inputs)
    return deviation(fast, both_passes(ssd, inputs))


def convolutions(device: torch.device, heads: int, channels: int, groups: int, states: int) -> float:
    """On a slice of a wider projection, which begins where the gate ends and is not contiguous."""
    inner, size = heads * channels, heads * channels + 2 * groups * states
    draw = torch.Generator().manual_seed(0)
    projected = torch.randn(2, 300, inner + size + heads, generator=draw).to(device)
    weight, bias = (torch.randn(*shape, generator=draw).to(device) for shape in ((size, 1, 4), (size,)))
    inputs = *rounded((projected,)), weight, bias

    def fast(projected: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kernels.conv_silu(projected.bfloat16()[..., inner : inner + size], weight, bias, torch.bfloat16)

    def slow(projected: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv_silu(projected[..., inner : inner + size], weight, bias)

    return deviation(both_passes(fast, inputs), both_passes(slow, inputs))


def norms(device: torch.device, heads: int, channels: int, groups: int, states: int) -> float:
    draw, inner = torch.Generator().manual_seed(0), heads * channels
    y, z = rounded(tuple(torch.randn(2, 300, inner, generator=draw).to(device) for _ in range(2)))
    weight = torch.randn(inner, generator=draw).to(device)

    def slow(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        grouped = (y * F.silu(z)).unflatten(-1, (groups, -1))
        return F.rms_norm(grouped, grouped.shape[-1:], eps=1e-5).flatten(-2) * weight

    def fast(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return kernels.gated_norm(y, z, weight, 1e-5, groups, torch.bfloat16)

    return deviation(both_passes(fast, (y, z, weight)), both_passes(slow, (y, z, weight)))


def layers(device: torch.device, heads: int, channels: int, groups: int, states: int, length: int = 300) -> float:
    """Everything between the projections of a Mamba layer by one kernel."""
    inner, shared = heads * channels, groups * states
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    shapes = (1, length, 2 * inner + 2 * shared + heads), (inner + 2 * shared, 4), (inner + 2 * shared,)
    inputs = [draw(shape).to(device) for shape in (*shapes, (heads,), (heads,), (heads,), (inner,))]
    inputs[:1] = rounded(inputs[:1])
    sizes = kernels.MambaSizes(channels, groups, (1e-3, float("inf")), 1e-5)

    def exact(projected, weight, bias, dt_bias, A_log, D, norm):
        z, conv, dt = projected.split([inner, inner + 2 * shared, heads], -1)
        x, B, C = causal_conv_silu(conv, weight[:, None], bias).split([inner, shared, shared], -1)
        B, C = (t.unflatten(-1, (groups, states)) for t in (B, C))
        dt = F.softplus(dt + dt_bias).clamp(min=sizes.time_step_limit[0])
        y = ssd(x.unflatten(-1, (heads, channels)), dt, -A_log.exp(), B, C, D)
        return group_rms_norm(y.flatten(2) * F.silu(z), norm, sizes.eps, groups, inner // groups)

    def fast(projected, weight, bias, dt_bias, A_log, D, norm):
        projected = projected.bfloat16()
        kernel = kernels.layer_kernel(projected, inner, inner + 2 * shared, 4, torch.bfloat16)
        return kernel(projected, weight, bias, dt_bias, -A_log.exp(), D, norm, sizes, None)

    return deviation(both_passes(fast, tuple(inputs)), both_passes(exact, tuple(inputs)))


def shared_rows(device: torch.device, bound: float) -> Iterator[Row]:
    """Rows in four parts, as workers that share sequences compute them, against whole rows. Two documents per row."""
    ids = (torch.arange(64) >= 40).long().repeat(2, 1)
    whole = Documents(ids, device)
    for dtype, limit in ((torch.float32, bound), (torch.bfloat16, TRITON)):
        for name, (function, inputs) in operations_on_rows(device, dtype).items():
            expected = both_passes(lambda *values, function=function: function(*values, whole), inputs)
            found = both_passes(lambda *values, function=function: in_parts(function, values, ids, device), inputs)
            what = f"{name}, {str(dtype).removeprefix('torch.')}: output and gradients"
            yield within("shared rows = whole rows", what, deviation(found, expected), limit)


def operations_on_rows(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Callable, tuple[Tensor, ...]]]:
    """What passes from position to position: name → (function of inputs and documents, inputs (2, 64, ...))."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    query, key, value, B, C = (normal(2, 64, heads, 32) for heads in (4, 2, 2, 2, 2))
    x, weight, A, D = normal(2, 64, 24), normal(24, 1, 4), -normal(4).float().abs(), normal(4).float()
    dt = 0.1 * normal(2, 64, 4).float().abs()
    return {
        "attention": (causal_attention, (query, key, value)),
        "convolution": (lambda x, documents: kernels.conv_silu(x, weight, None, dtype, documents), (x,)),
        "scan": (
            lambda x, dt, B, C, documents: kernels.scan(x, dt, A, B, C, D, dtype, documents),
            (query, dt, B, C),
        ),
    }


def in_parts(
    function: Callable, inputs: tuple[Tensor, ...], ids: Tensor, device: torch.device, size: int = 4
) -> Tensor:
    """`function` of each part of the rows, one part after another, put together.

    In a first pass every part leaves what it gives to the others; in the second one, each gets what all have given.
    """
    given: list[Tensor] = []

    def leave(x: Tensor) -> Tensor:
        given.append(x)
        return x[None].expand(size, *x.shape)

    outputs = []
    for gather in (leave, lambda x: torch.stack(given)):
        outputs = []
        for rank in range(size):
            documents = PartDocuments(ids, device, Part(rank, size, gather))
            where = documents.part.positions(ids.shape[1])
            outputs.append(function(*(value[:, where] for value in inputs), documents))
    return torch.cat(outputs, 1)
