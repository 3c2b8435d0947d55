"""The operations of a Mamba-2 layer: with the fast kernels on a GPU if they are installed, else with torch.

Only this file imports `mamba_ssm` (scan and gated norm, in Triton) and `causal_conv1d`. They are used for 16-bit types
only, because they compute float32 products in TF32, which is less exact. If a kernel cannot be used on a GPU, the
reason is logged once, and the torch version computes the same result more slowly. With both packages, a layer without
gates takes one call for everything between its two projections, which keeps less for the backward pass.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_core.model.documents import Documents
from elastic_core.model.ops.conv import causal_conv_silu
from elastic_core.model.ops.norm import group_rms_norm
from elastic_core.model.ops.parts import PartDocuments, from_earlier_parts, part_of, with_inputs_before
from elastic_core.model.ops.ssd import ssd

CHUNK = 128  # positions in a chunk of the Triton scan
ALIGNED = 8  # causal_conv1d needs channels and strides that are multiples of this
WIDTHS = (2, 3, 4)  # kernel sizes for which causal_conv1d is compiled
# Before, mamba_ssm's kernel of a whole layer copied inputs of widths that are no multiple of 8 into a layout for which
# causal_conv1d has no boundaries between documents.
LAYER_VERSION = (2, 3)

logger = logging.getLogger(__name__)


def layer_kernel(projected: Tensor, inner: int, conv_channels: int, taps: int, dtype: torch.dtype) -> Callable | None:
    """The kernel for everything between in_proj and out_proj; None if it cannot be used: then call the parts below.

    `projected` (B, L, z | x | B | C | dt) is the output of in_proj, `inner` the channels of z and of x, and
    `conv_channels` those of x, B and C. Call the kernel with

        projected, weight (conv_channels, K) and bias of the convolution, dt_bias, A, D (heads,), weight of the norm
        (inner,), MambaSizes, documents

    It returns (B, L, inner) in `dtype`.
    """
    if not _has_kernels(projected.device, dtype):
        return None
    # The convolution's part of `projected` begins after z. Its kernel reads 16 bytes at a time.
    fits = conv_channels % ALIGNED == inner % ALIGNED == 0 and taps in WIDTHS and projected.shape[1] > 1
    found = _look_up(_mamba_layer)
    return found if fits and not isinstance(found, str) else None


@dataclass(frozen=True)
class MambaSizes:
    """What the kernel of a whole layer has to know: channels of a head, groups, limits of dt, epsilon of the norm."""

    channels: int
    groups: int
    time_step_limit: tuple[float, float]
    eps: float


def conv_silu(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, documents: Documents | None = None
) -> Tensor:
    """`causal_conv_silu` of x (B, L, C) → (B, L, C). `dtype` is the type in which the layers compute."""
    channels, taps = x.shape[2], weight.shape[2]
    if part_of(documents) is not None and taps > 1:
        return documents.uncompiled(_conv_of_part, x, weight, bias, dtype, documents)
    problem = None
    if channels % ALIGNED:
        problem = f"{channels} channels, but it needs a multiple of {ALIGNED}; choose other heads or head channels"
    elif taps not in WIDTHS:
        problem = f"a convolution over {taps} positions, but it supports {', '.join(map(str, WIDTHS))}"
    kernel = _kernel(_causal_conv1d, x.device, dtype, problem)
    if kernel is None:
        if documents is None:
            return causal_conv_silu(x, weight, bias)
        return documents.uncompiled(_conv_of_documents, x, weight, bias, documents)
    x = _aligned(x.to(dtype)).transpose(1, 2)
    return kernel(x, weight.squeeze(1), bias, None if documents is None else documents.ids).transpose(1, 2)


def _conv_of_part(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, documents: PartDocuments
) -> Tensor:
    halo = weight.shape[2] - 1
    x = with_inputs_before(x, halo, documents)
    return conv_silu(x, weight, bias, dtype, documents.with_halo(halo))[:, halo:]


def _conv_of_documents(x: Tensor, weight: Tensor, bias: Tensor | None, documents: Documents) -> Tensor:
    # The tensor of starts is read here, where torch.compile does not see its size.
    return causal_conv_silu(x, weight, bias, documents.inner_starts)


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dtype: torch.dtype,
    documents: Documents | None = None,
) -> Tensor:
    """`ssd`, with dt and A in float32 or higher. With a kernel, the result has type `dtype`, else the type of dt."""
    y = _scan_of_part(x, dt, A, B, C, D, dtype, documents)
    if part_of(documents) is not None:
        y = y + documents.uncompiled(from_earlier_parts, x, dt, A, B, C, documents).to(y.dtype)
    return y


def _scan_of_part(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dtype: torch.dtype, documents: Documents | None
) -> Tensor:
    """`scan`, as if rows began here."""
    kernel = _kernel(_mamba_scan, x.device, dtype)
    if kernel is None:
        dtype = dt.dtype
        starts = None if documents is None else documents.is_inner_start
        return ssd(x.to(dtype), dt, A, B.to(dtype), C.to(dtype), D.to(dtype), starts=starts)
    ids = None if documents is None else documents.ids
    return kernel(x.to(dtype), dt, A, B.to(dtype), C.to(dtype), D.to(dt.dtype), ids)


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, dtype: torch.dtype) -> Tensor:
    """`group_rms_norm` of y·silu(z) with all channels live, in `dtype`. y and z (B, L, C) → (B, L, C)."""
    kernel = _kernel(_mamba_norm, y.device, dtype)
    if kernel is not None:
        return kernel(y.to(dtype), z.to(dtype), weight, eps, y.shape[-1] // groups)
    wide = torch.promote_types(y.dtype, torch.float32)
    y = y.to(wide) * F.silu(z.to(wide))
    return group_rms_norm(y, weight, eps, groups, y.shape[-1] // groups).to(dtype)


def missing() -> dict[str, str]:
    """The kernels that cannot be imported on this machine: name → reason."""
    finders = {"convolution": _causal_conv1d, "scan": _mamba_scan, "gated norm": _mamba_norm, "layer": _mamba_layer}
    return {name: found for name, find in finders.items() if isinstance(found := _look_up(find), str)}


def look_up() -> None:
    """Import the kernels now, and log which are missing.

    Call it before torch.compile traces a layer: it cannot trace an import or a log message, and would split the graph.
    Call it before deterministic algorithms are switched on for a part of a program only: mamba_ssm chooses the
    configurations of its kernels when it is imported, and has one for each while they are on.
    """
    for find in (_causal_conv1d, _mamba_scan, _mamba_norm):
        _kernel(find, torch.device("cuda"), torch.bfloat16)
    _look_up(_mamba_layer)


_found: dict[str, Callable | str] = {}  # what was looked up in this process, by the name of the function


def _look_up(find: Callable[[], Callable | str]) -> Callable | str:
    """`find()`, called once per process. torch.compile traces the look-up in the table, not the import."""
    if find.__name__ not in _found:
        _found[find.__name__] = find()
    return _found[find.__name__]


def _has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels are used there at all."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def _kernel(
    find: Callable[[], Callable | str], device: torch.device, dtype: torch.dtype, problem: str | None = None
) -> Callable | None:
    """The kernel that `find` returns, or None to use torch. On a GPU with a 16-bit type, the reason is logged."""
    if not _has_kernels(device, dtype):
        return None
    if problem is None:
        found = _look_up(find)
        if not isinstance(found, str):
            return found
        problem = found
    if not torch.compiler.is_compiling():  # a log message would split the graph
        _warn(f"{find.__name__.strip('_')} is not used; torch computes the same more slowly. Reason: {problem}")
    return None


@functools.cache
def _warn(message: str) -> None:  # cached, so each message is logged once
    logger.warning(message)


def _aligned(x: Tensor) -> Tensor:
    """x (B, L, C) with the strides that causal_conv1d needs: x itself, or a copy of a slice with other strides."""
    fits = x.stride(2) == 1 and x.storage_offset() % ALIGNED == x.stride(0) % ALIGNED == x.stride(1) % ALIGNED == 0
    # For `contiguous`, the strides of a single row or position do not matter. For the kernel they do.
    return x if fits else x.clone(memory_format=torch.contiguous_format)


# Each of these returns the function of a kernel, or a text why it cannot be imported. torch.compile does not trace the
# kernels.


def _causal_conv1d() -> Callable | str:
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError as error:
        return f"causal_conv1d cannot be imported ({error}); pip install causal-conv1d"
    return torch.compiler.disable(functools.partial(_call_conv, causal_conv1d_fn))


def _call_conv(function: Callable, x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None) -> Tensor:
    return function(x, weight, bias, seq_idx=ids, activation="silu")


def _mamba_scan() -> Callable | str:
    try:
        _make_mamba_importable()
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError as error:
        return f"mamba_ssm cannot be imported ({error}); pip install mamba-ssm"
    return torch.compiler.disable(functools.partial(_call_scan, mamba_chunk_scan_combined))


def _call_scan(
    function: Callable, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, ids: Tensor | None
) -> Tensor:
    return function(x, dt, A, B, C, chunk_size=CHUNK, D=D, seq_idx=ids)


def _mamba_layer() -> Callable | str:
    try:
        _make_mamba_importable()
        from causal_conv1d.cpp_functions import causal_conv1d_fwd_function  # noqa: F401 (mamba_ssm calls it)
        from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

        installed = version("mamba-ssm")
    except ImportError as error:
        return f"mamba_ssm or causal_conv1d cannot be imported ({error}); pip install mamba-ssm causal-conv1d"
    if tuple(map(int, re.findall(r"\d+", installed)[:2])) < LAYER_VERSION:
        return f"mamba_ssm {installed} computes not every width of packed rows; pip install 'mamba-ssm>=2.3'"
    return torch.compiler.disable(functools.partial(_call_layer, mamba_split_conv1d_scan_combined))


def _call_layer(
    function: Callable,
    projected: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    sizes: MambaSizes,
    documents: Documents | None,
) -> Tensor:
    ids = None if documents is None else documents.ids
    return function(
        projected, weight, bias, dt_bias, A, D, CHUNK, seq_idx=ids, dt_limit=sizes.time_step_limit,
        rmsnorm_weight=norm_weight, rmsnorm_eps=sizes.eps, headdim=sizes.channels, ngroups=sizes.groups,
        norm_before_gate=False,
    )  # fmt: skip


def _mamba_norm() -> Callable | str:
    try:
        _make_mamba_importable()
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
    except ImportError as error:
        return f"mamba_ssm cannot be imported ({error}); pip install mamba-ssm"
    return torch.compiler.disable(functools.partial(_call_norm, rmsnorm_fn))


def _call_norm(function: Callable, y: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    return function(y, weight, None, z=z, eps=eps, group_size=group_size, norm_before_gate=False)


def _make_mamba_importable() -> None:
    """Make the Triton modules of mamba_ssm importable, even if the package itself is not.

    Its __init__ imports a CUDA extension that the Triton modules do not need. If that fails, put an empty module of the
    same name in its place, with which the submodules are found. Other code could not import the real package either.
    Raises ImportError if mamba_ssm is not installed.
    """
    try:
        import mamba_ssm  # noqa: F401
    except ImportError:
        if (spec := importlib.util.find_spec("mamba_ssm")) is None:
            raise
        sys.modules["mamba_ssm"] = importlib.util.module_from_spec(spec)
