"""mamba_ssm's Triton kernels on tensors in CPU memory, by Triton's interpreter. `load()` before anything imports them.

What asks for a driver or a GPU is replaced, the autotuner has one configuration, and bfloat16 is rounded as on a GPU
(the interpreter keeps it as bits, truncates it, and multiplies the bits). It reaches into private parts of triton.
"""

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import types

VERSIONS = {"triton": "3.9.", "mamba-ssm": "2.3."}  # for which this was made


def reason() -> str | None:
    """Why this is not possible here, or None."""
    for package, version in VERSIONS.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed: the extra `cuda-path` of pyproject.toml"
        if not found.startswith(version):
            return f"{package} {found}: this was made for {version}x"
    return None if importlib.util.find_spec("einops") else "einops is not installed (mamba_ssm needs it)"


def load() -> None:
    """Make it so, in this process."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from triton.runtime.autotuner import Autotuner

    Autotuner.run = _run_largest
    torch.cuda.device = lambda *args, **keywords: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *args, **keywords: types.SimpleNamespace(multi_processor_count=4)
    _round_bfloat16()


def _run_largest(self, *args, **keywords):
    """Autotuner.run without a benchmark: the configuration with the largest blocks, with its pre_hook as on a GPU."""

    def size(config) -> int:
        return math.prod(value for name, value in config.kwargs.items() if name.startswith("BLOCK"))

    self.nargs = dict(zip(self.arg_names, args, strict=False))
    config = self.best_config = max(self.configs, key=size)  # best_config: mamba_ssm reads it
    if config.pre_hook is not None:
        config.pre_hook({**self.nargs, **keywords, **config.all_kwargs()})
    return self.fn.run(*args, **keywords, **config.all_kwargs())


def _round_bfloat16() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_cast, plain_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(handle):
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(data):
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    def cast(self, source, target):
        before, after = source.dtype.scalar, target.scalar
        if before == after:
            return source
        if before == tl.bfloat16:
            return widened(source) if after == tl.float32 else plain_cast(self, widened(source), target)
        if after == tl.bfloat16:
            return TensorHandle(rounded(source.data.astype(np.float32)), tl.bfloat16)
        return plain_cast(self, source, target)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        assert a.dtype.scalar == b.dtype.scalar, (a.dtype, b.dtype)
        a, b = (widened(t) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return plain_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot
    InterpreterBuilder.create_fp_to_fp = lambda self, source, target, mode: cast(self, source, target)
