"""The operations of a Mamba-2 layer by the fastest way that there is: kernels on a GPU, torch elsewhere.

The only file that knows `mamba_ssm` (scan and gated norm, in Triton) and `causal_conv1d`. They are taken for 16-bit
types: their products of float32 run in TF32, and float32 was asked for to be exact. Where one cannot be taken, the
reason is logged once and the torch twin computes the same, slower.
"""

import functools
import importlib.util
import logging
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_core.model.ops.conv import causal_conv_silu
from elastic_core.model.ops.norm import group_rms_norm
from elastic_core.model.ops.ssd import ssd

CHUNK = 128  # positions of a chunk, for Triton
ALIGNED = 8  # channels and strides that causal_conv1d reads at once
WIDTHS = (2, 3, 4)  # taps that causal_conv1d is compiled for

logger = logging.getLogger(__name__)


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`causal_conv_silu` of x (B, L, C); `dtype` is what the layers compute in, here and below."""
    channels, taps = x.shape[2], weight.shape[2]
    problem = None
    if channels % ALIGNED:
        problem = f"{channels} channels, which is no multiple of {ALIGNED}: choose heads and head channels so"
    elif taps not in WIDTHS:
        problem = f"a convolution over {taps} positions, and it has {', '.join(map(str, WIDTHS))}"
    kernel = _kernel(_causal_conv1d, x.device, dtype, problem)
    if kernel is None:
        return causal_conv_silu(x, weight, bias)
    return kernel(_aligned(x.to(dtype)).transpose(1, 2), weight.squeeze(1), bias).transpose(1, 2)


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dtype: torch.dtype) -> Tensor:
    """`ssd`, dt and A in float32 at least: the result has their type, or `dtype` where it is a kernel's."""
    kernel = _kernel(_mamba_scan, x.device, dtype)
    if kernel is None:
        dtype = dt.dtype
        return ssd(x.to(dtype), dt, A, B.to(dtype), C.to(dtype), D.to(dtype))
    return kernel(x.to(dtype), dt, A, B.to(dtype), C.to(dtype), D.to(dt.dtype))


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, dtype: torch.dtype) -> Tensor:
    """`group_rms_norm` of y·silu(z), all channels of which are live, as `dtype`. y and z (B, L, C)."""
    kernel = _kernel(_mamba_norm, y.device, dtype)
    if kernel is not None:
        return kernel(y.to(dtype), z.to(dtype), weight, eps, y.shape[-1] // groups)
    wide = torch.promote_types(y.dtype, torch.float32)
    y = y.to(wide) * F.silu(z.to(wide))
    return group_rms_norm(y, weight, eps, groups, y.shape[-1] // groups).to(dtype)


def missing() -> dict[str, str]:
    """Which kernels cannot be had on this machine, and why."""
    finders = {"convolution": _causal_conv1d, "scan": _mamba_scan, "gated norm": _mamba_norm}
    return {name: found for name, find in finders.items() if isinstance(found := find(), str)}


def _kernel(
    find: Callable[[], Callable | str], device: torch.device, dtype: torch.dtype, problem: str | None = None
) -> Callable | None:
    """What `find` finds, or None where torch has to do; for a GPU and a 16-bit type not without saying so."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    if problem is None:
        found = find()
        if not isinstance(found, str):
            return found
        problem = found
    _warn(f"{find.__name__.strip('_')} is not used, torch's slower way is: {problem}")
    return None


@functools.cache
def _warn(message: str) -> None:
    logger.warning(message)


def _aligned(x: Tensor) -> Tensor:
    """x (B, L, C) as causal_conv1d reads it, copied where a slice of something wider does not begin at such a place."""
    fits = x.stride(2) == 1 and x.storage_offset() % ALIGNED == x.stride(0) % ALIGNED == x.stride(1) % ALIGNED == 0
    return x if fits else x.contiguous()


# Each returns a function, or in words why there is none; torch.compile leaves them as they are.


@functools.cache
def _causal_conv1d() -> Callable | str:
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError as error:
        return f"causal_conv1d cannot be imported ({error}); pip install causal-conv1d"
    return torch.compiler.disable(functools.partial(_call_conv, causal_conv1d_fn))


def _call_conv(function: Callable, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return function(x, weight, bias, activation="silu")


@functools.cache
def _mamba_scan() -> Callable | str:
    try:
        _reach_mamba()
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError as error:
        return f"mamba_ssm cannot be imported ({error}); pip install mamba-ssm"
    return torch.compiler.disable(functools.partial(_call_scan, mamba_chunk_scan_combined))


def _call_scan(function: Callable, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    return function(x, dt, A, B, C, chunk_size=CHUNK, D=D)


@functools.cache
def _mamba_norm() -> Callable | str:
    try:
        _reach_mamba()
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
    except ImportError as error:
        return f"mamba_ssm cannot be imported ({error}); pip install mamba-ssm"
    return torch.compiler.disable(functools.partial(_call_norm, rmsnorm_fn))


def _call_norm(function: Callable, y: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    return function(y, weight, None, z=z, eps=eps, group_size=group_size, norm_before_gate=False)


def _reach_mamba() -> None:
    """Make mamba_ssm's Triton modules importable where the package itself is not.

    Its __init__ wants an extension in CUDA that they do not need. Where it fails, an empty package in its place leads
    to them; nobody else could have imported the real one either.
    """
    try:
        import mamba_ssm  # noqa: F401
    except ImportError:
        if (spec := importlib.util.find_spec("mamba_ssm")) is None:
            raise
        sys.modules["mamba_ssm"] = importlib.util.module_from_spec(spec)
