"""`python -m tests.support.cuda.kernel_cases`: mamba_ssm's kernels through our own code, interpreted, against torch.

Prints the largest relative deviation of every case, over outputs and all gradients, as JSON: of all cases, of those
that are named, or after `--but` of all others. In a process of its own: Triton has to be told before its import.
"""

# isort: skip_file
# ruff: noqa: E402
from tests.support.cuda import interpreted

interpreted.load()

import functools
import json
import os
import sys

import torch
import torch.nn.functional as F
from transformers import NemotronHConfig

from benchmarks.kernels import both_passes, deviation, layers
from benchmarks.shapes import scan_inputs
from elastic_core import Submodel
from elastic_core.model.documents import Documents
from elastic_core.model.ops import kernels
from elastic_core.model.ops.norm import group_rms_norm
from elastic_core.model.ops.ssd import ssd, ssd_naive
from tests.support.cuda import conv_stand_in
from tests.support.models.parents import random_elastic

CPU = torch.device("cpu")
# positions, heads, channels, groups, states, sequences: no multiples of the chunk of 128, nor powers of two
SCANS = [(1, 2, 16, 1, 16, 1), (140, 3, 40, 1, 16, 2)]
DOCUMENTS = (129, 3, 24, 3, 32, 1)
BFLOAT16 = (140, 6, 40, 2, 16, 1)
# heads, channels, groups, states | kept heads, channels, hidden | positions
LAYERS = [((4, 16, 2, 16), (2, 8, 16), 130), ((6, 24, 2, 16), (4, 16, 24), 37)]


def documents_of(length: int, sequences: int = 1) -> Documents:
    """Three documents in every row; one begins in the middle of a chunk."""
    ids = torch.bucketize(torch.arange(length), torch.tensor([length // 3, 2 * length // 3]), right=True)
    return Documents(ids.repeat(sequences, 1), CPU)


def scan(shape: tuple, dtype: torch.dtype, with_documents: bool) -> float:
    inputs = scan_inputs(CPU, *shape)
    documents = documents_of(shape[0], shape[-1]) if with_documents else None
    starts = None if documents is None else documents.is_inner_start
    if dtype == torch.bfloat16:  # both begin at the same numbers
        inputs = tuple(value.bfloat16().float() if i in (0, 3, 4) else value for i, value in enumerate(inputs))
        exact = both_passes(functools.partial(ssd, starts=starts), inputs)
    else:
        exact = both_passes(functools.partial(ssd_naive, starts=starts), tuple(value.double() for value in inputs))
        exact = {name: value.float() for name, value in exact.items()}
    return deviation(both_passes(lambda *v: kernels.scan(*v, dtype, documents), inputs), exact)


def initial_state() -> float:
    """The scan's kernel with a state before the first position, which a text in parts needs."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, dt, A, B, C, D = scan_inputs(CPU, 150, 4, 16, 2, 16)
    state = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))

    def exact(x, dt, A, B, C, D, state):
        B, C = (t.repeat_interleave(2, 2) for t in (B, C))
        outputs = []
        for t in range(x.shape[1]):
            state = torch.exp(A * dt[:, t])[..., None, None] * state
            state = state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
            outputs.append((state * C[:, t, :, None, :]).sum(-1) + D[:, None] * x[:, t])
        return torch.stack(outputs, 1)

    inputs = (x, dt, A, B, C, D, state)
    expected = both_passes(exact, tuple(value.double() for value in inputs))
    found = both_passes(lambda *v: mamba_chunk_scan_combined(*v[:5], 64, D=v[5], initial_states=v[6]), inputs)
    return deviation(found, {name: value.float() for name, value in expected.items()})


def norm() -> float:
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    inputs = draw(1, 37, 72), draw(1, 37, 72), draw(72)

    def exact(y, z, weight):
        return group_rms_norm(y * F.silu(z), weight, 1e-5, 3, 24)

    return deviation(
        both_passes(lambda y, z, weight: kernels.gated_norm(y, z, weight, 1e-5, 3, torch.float32), inputs),
        both_passes(exact, inputs),
    )


def layer(shape: tuple, kept: tuple, length: int, is_sliced: bool, way: str, second: str = "full_attention") -> float:
    """A hybrid with one Mamba layer by kernels, against torch: logits and all gradients. `way`: whole, parts, gates.

    second: the type of the other layer.
    """
    heads, channels, groups, states = shape
    config = NemotronHConfig(
        vocab_size=37, hidden_size=24, layers_block_type=["mamba", second], num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, intermediate_size=16, ssm_state_size=states, mamba_num_heads=heads,
        mamba_head_dim=channels, n_groups=groups, conv_kernel=4, use_conv_bias=True, time_step_limit=(0.01, 0.5),
    )  # fmt: skip
    model = random_elastic(1, config)
    ids = torch.randint(0, 37, (1, length), generator=torch.Generator().manual_seed(0))
    kept_heads, kept_channels, hidden = kept
    submodel = Submodel(hidden, (0, 1), None, kept_heads, kept_channels, 2) if is_sliced else Submodel()
    submodel = submodel.resolve(config)
    sizes = submodel.sizes(config)
    documents = torch.bucketize(torch.arange(length), torch.tensor([length // 2]), right=True)[None]

    def both(with_kernels: bool) -> dict:
        kernels._has_kernels = lambda device, dtype: with_kernels
        kernels._found.pop("_mamba_layer", None)
        if way != "whole":
            kernels._found["_mamba_layer"] = "left out"
        model.zero_grad(set_to_none=True)
        gates = None
        if way == "gates":
            gates = {key: torch.full((sizes[key],), 0.75) for key in ("mamba_heads.0", "mamba_channels.0")}
            gates = {key: gate.requires_grad_() for key, gate in gates.items()}
        y = model(ids, submodel, gates, documents)
        (y * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
        found = {"y": y.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return found | {key: gate.grad for key, gate in (gates or {}).items()}

    expected, found = both(False), both(True)
    assert (way == "whole") == callable(kernels._found.get("_mamba_layer")), kernels._found
    return deviation(found, expected)


def one_token() -> float:
    """A text of one token, whose strides the convolution refuses as they are. There is no attention, because queries
    would have no effect on it, and their gradients would be rounding alone."""
    return layer((8, 16, 4, 16), (4, 8, 16), 1, False, "parts", second="mlp")


def cases():
    for shape in SCANS:
        yield f"scan {shape}", functools.partial(scan, shape, torch.float32, False)
    yield "scan with documents", functools.partial(scan, DOCUMENTS, torch.float32, True)
    yield "scan bfloat16", functools.partial(scan, BFLOAT16, torch.bfloat16, True)
    yield "scan with a state", initial_state
    yield "gated norm", norm
    yield "layer of the benchmark", functools.partial(layers, CPU, 4, 16, 2, 16, 140)
    yield "layer whole", functools.partial(layer, *LAYERS[1], False, "whole")
    yield "layer sliced", functools.partial(layer, *LAYERS[0], True, "whole")
    yield "layer in parts", functools.partial(layer, *LAYERS[1], True, "parts")
    yield "layer with gates", functools.partial(layer, *LAYERS[1], False, "gates")
    yield "one token", one_token


if __name__ == "__main__":
    conv_stand_in.install()
    kernels._has_kernels = lambda device, dtype: True  # in CPU memory and float32 too
    found, named = dict(cases()), [name for name in sys.argv[1:] if name != "--but"]
    if unknown := set(named) - found.keys():
        raise SystemExit(f"no such case: {', '.join(sorted(unknown))}")
    asked = [name for name in found if name not in named] if "--but" in sys.argv else named or list(found)
    print("RESULT", json.dumps({name: found[name]() for name in asked}), flush=True)
    sys.stdout.flush()
    os._exit(0)  # the interpreter may abort at its end
