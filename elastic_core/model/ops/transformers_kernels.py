"""transformers' Mamba-2 layers on a CPU, where the packages of the fast kernels are installed.

transformers takes the functions of `mamba_ssm` and `causal_conv1d` when it imports its model, wherever they can be
imported. They run on GPUs only, so on a machine with a GPU its nemotron_h would fail on tensors in CPU memory.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType

from torch import Tensor

MODELING = "transformers.models.nemotron_h.modeling_nemotron_h"
FUNCTIONS = (
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba2_split_conv1d_scan_combined",
    "mamba2_selective_state_update",
    "mamba2_chunk_scan",
)


def choose_by_device(modeling: ModuleType | None = None) -> None:
    """Let transformers' nemotron_h compute tensors in CPU memory with its own torch functions, and others as before.

    Call it after a model was loaded or its class was imported. `modeling` is the module with the layers (None: that of
    the installed transformers; if it is not imported, nothing is done). To call this again changes nothing.
    """
    modeling = sys.modules.get(MODELING) if modeling is None else modeling
    for name in FUNCTIONS:
        function = getattr(modeling, name, None)
        reference = getattr(function, "__wrapped__", None)  # transformers' own function, behind its choice of a kernel
        if reference is not None and not hasattr(function, "on_cpu"):
            setattr(modeling, name, _by_device(function, reference))


def _by_device(function: Callable, reference: Callable) -> Callable:
    parameters = inspect.signature(reference).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    known = {parameter.name for parameter in parameters}

    @functools.wraps(reference)
    def call(x: Tensor, *args, **keywords):
        # The reference would ignore the boundaries of packed sequences; transformers says so itself.
        is_packed = keywords.get("seq_idx") is not None or keywords.get("cu_seqlens") is not None
        if x.device.type != "cpu" or is_packed:
            return function(x, *args, **keywords)
        return reference(x, *args, **{key: value for key, value in keywords.items() if takes_all or key in known})

    call.on_cpu = reference
    return call
