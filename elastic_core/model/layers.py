"""Parts of layers that all architectures share. Parameters have the names of transformers and the parent's full shapes.

Every forward takes a `Slice` and computes only with the kept part of the parameters.
"""

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_core.model.dims import Layout
from elastic_core.model.documents import Documents
from elastic_core.model.ops.norm import rms_norm
from elastic_core.model.ops.parts import attention_with_earlier_parts
from elastic_core.model.ops.parts import part_of as part_of_rows
from elastic_core.model.slicing import Slice

logger = logging.getLogger(__name__)

LOW_PRECISION = (torch.bfloat16, torch.float16)
LONGEST_MASK = 256  # positions; in longer rows, a call per document costs less than a mask over all pairs of positions
CAUSAL = (-1, 0)  # the window of variable-length attention: any number of earlier positions, no later ones


def add_parameters(module: nn.Module, layout: Layout) -> None:
    """Add an uninitialised parameter to `module` for every entry of `layout`; a dot in a name creates a submodule."""
    for name, dims in layout.items():
        owner = module
        *path, leaf = name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(leaf, nn.Parameter(torch.empty([dim.size for dim in dims])))


def part_of(layout: Layout, prefix: str) -> Layout:
    """The entries with names that start with ``PREFIX.``; this start is removed from their names."""
    return {name.removeprefix(f"{prefix}."): dims for name, dims in layout.items() if name.startswith(f"{prefix}.")}


class Norm(nn.Module):
    """RMSNorm over the live hidden channels; x is (B, L, kept hidden). `name` is that of its gain in the layout."""

    def __init__(self, name: str, eps: float, layout: Layout):
        super().__init__()
        self.name, self.eps, self.layout = name, eps, layout
        add_parameters(self, layout)

    def forward(self, x: Tensor, sliced: Slice) -> Tensor:
        sliced.observe(self.name, x)
        gain = sliced.norm_gain(self.name)
        if gain is None:
            gain = sliced.weight(self, self.layout, "weight")
        x = rms_norm(x, gain, self.eps, sliced.num_live("hidden"))
        sliced.observe("hidden", x)
        return x


def causal_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents | None = None) -> Tensor:
    """Softmax attention to earlier positions of the same document (None: a row is one document).

    query (B, L, A, d), key and value (B, L, KV, d) → (B, L, A · d). A is the number of kept query heads. The heads of
    each KV group are adjacent, and every group has A / KV of them.
    """
    if documents is None:
        y = _attention(query, key, value, is_causal=True)
    elif part_of_rows(documents) is not None:
        has_flash = _has_flash_attention(query.device, query.dtype, query.shape[-1])
        kernel = _packed_attention if has_flash else None
        y = documents.uncompiled(attention_with_earlier_parts, query, key, value, documents, _attention, kernel)
    elif has_mask(query.shape[1], query.dtype, query.is_cuda):
        y = _attention(query, key, value, attn_mask=documents.mask(query.dtype))
    elif _has_flash_attention(query.device, query.dtype, query.shape[-1]):
        y = documents.uncompiled(_variable_length_attention, query, key, value, documents)
    else:
        y = documents.uncompiled(_attention_by_document, query, key, value, documents)
    return y.flatten(2)


def has_mask(length: int, dtype: torch.dtype, on_gpu: bool) -> bool:
    """Whether attention scores all pairs of positions in rows of documents, and a mask hides other documents."""
    return length <= LONGEST_MASK and not (on_gpu and dtype in LOW_PRECISION)


@functools.cache
def _has_flash_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's variable-length attention runs there. If only the GPU or the heads do not fit, it is logged."""
    if device.type != "cuda" or dtype not in LOW_PRECISION:
        return False
    problem = None
    if torch.cuda.get_device_capability(device) < (8, 0):
        problem = "the GPU is older than compute capability 8.0"
    elif head_dim % 8 or head_dim > 256:
        problem = f"heads of {head_dim} channels, but it needs a multiple of 8, at most 256"
    if problem is not None:
        logger.warning(f"variable-length attention is not used; documents are computed one by one. Reason: {problem}")
    return problem is None


def _attention(query: Tensor, key: Tensor, value: Tensor, **mask) -> Tensor:
    repeats = query.is_cuda and query.dtype not in LOW_PRECISION
    if repeats:
        # The kernel that never holds all scores takes float32 only if keys have as many heads as queries. Otherwise
        # torch stores the scores of all pairs of positions, which are far larger than the copies here.
        key, value = (t.repeat_interleave(query.shape[2] // t.shape[2], dim=2) for t in (key, value))
    tensors = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(*tensors, enable_gqa=not repeats, **mask).transpose(1, 2)


def _attention_by_document(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    """One call per document. The cost is the sum of the squares of their lengths, and there is no mask."""
    parts = [t.flatten(0, 1).split(documents.lengths) for t in (query, key, value)]  # (length, heads, d) each
    outputs = [_attention(*(t[None] for t in part), is_causal=True)[0] for part in zip(*parts, strict=True)]
    return torch.cat(outputs).view(query.shape)


def _variable_length_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    """Flash attention over documents of different lengths, in one kernel."""
    ends, longest = documents.cumulative_lengths, max(documents.lengths)
    tensors = (t.flatten(0, 1) for t in (query, key, value))
    return _packed_attention(*tensors, ends, ends, longest, longest).view(query.shape)


def _packed_attention(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, key_ends: Tensor, longest: int, longest_key: int
) -> Tensor:
    """A document with fewer queries than keys has its last queries: the last query sees all keys."""
    from torch.nn.attention.varlen import varlen_attn  # imports the compiler, for which a stage's start would wait

    return varlen_attn(query, key, value, ends, key_ends, longest, longest_key, window_size=CAUSAL, enable_gqa=True)
