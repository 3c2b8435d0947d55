"""The basis of the residual stream: rotate it to its principal axes, so that its first k channels hold the most (ours).

An RMSNorm without its gain commutes with every orthogonal matrix Q. So a model can be written in another basis of the
residual stream and still compute the same: embeddings E·Q; every matrix that reads the stream W·diag(g)·Q, where g is
the gain of the norm before it, which then becomes 1; every matrix that writes to it Qᵀ·W, and its bias Qᵀ·b. The result
is a model of the same architecture. Norms of single heads do not see the residual stream and stay as they are.

Q has the eigenvectors of Σ x̂·x̂ᵀ over all norms and positions of the calibration text, where x̂ is the input of a norm
divided by its root mean square. The first is that with the largest eigenvalue. Prefixes of principal axes are nested,
so one rotation serves all budgets. SliceGPT (arXiv 2401.15024) does this for one size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from elastic_core.config import ConfigError
from elastic_core.model import architectures
from elastic_core.model.dims import Dim, Units
from elastic_core.model.elastic_model import ElasticModel
from elastic_core.search.importance.calibration import Texts

ADVICE = "set parent.untie_head: true, which adds parameters, or rank.basis: channels"
BLOCK_VALUES = 1 << 24  # of a tensor that are rotated at one time, in float64
ACTIVATION_VALUES = 1 << 25  # of an activation from which sums are computed at one time


def check_basis(config) -> None:
    """Raise ConfigError if the residual stream of a model cannot be rotated: if its head is its embeddings.

    The gain of the final norm would have to go into the head alone.
    """
    if architectures.HEAD not in architectures.parameter_layout(config):
        raise ConfigError(f"rank.basis: principal is not possible with tied embeddings; {ADVICE}")


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the type in which the terms of sums are computed: float64; float32 for a 16-bit type."""
    return tensor.float() if tensor.dtype.itemsize == 2 else tensor.double()


def parts_of(tensor: Tensor, dim: int = 1, row_values: int | None = None) -> tuple[Tensor, ...]:
    """The tensor in parts along a dimension, each with at most ACTIVATION_VALUES numbers (but at least one row).

    `row_values`: the numbers of one row; None: counted in `tensor`. A tensor that is small enough is one part.
    """
    row_values = tensor.numel() // max(1, tensor.shape[dim]) if row_values is None else row_values
    return tensor.split(max(1, ACTIVATION_VALUES // max(1, row_values)), dim)


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A context in which products are in the type of their factors. Autocast would compute float32 ones in bfloat16."""
    # The meta device has no autocast.
    return contextlib.nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def directions(x: Tensor) -> Tensor:
    """Inputs of a norm (B, L, hidden), each divided by its root mean square: (B·L, hidden), in the type of `wide`."""
    x = wide(x.flatten(0, -2))
    return x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(x.dtype).tiny)


def principal_axes(second_moment: Tensor) -> Tensor:
    """The eigenvectors of a symmetric matrix, as columns, with decreasing eigenvalues. (hidden, hidden) float64.

    The sign of each is such that its largest entry is positive, so that the result does not depend on the library.
    """
    axes = torch.linalg.eigh(second_moment).eigenvectors.flip(-1)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return axes * largest.sign()


class RatioSums:
    """For every norm, the sum over positions of rms_k / rms_D, `totals[name]` (hidden,) float64: see `measure_ratios`.

    `observe` is the observer of a `Slice`.
    """

    def __init__(self, config, axes: Tensor | None, order: Tensor):
        self.totals: dict[str, Tensor | float] = dict.fromkeys(architectures.norm_names(config), 0.0)
        self._axes, self._order = axes, order
        self._numbers = torch.arange(1, config.hidden_size + 1)

    def observe(self, key: str, x: Tensor, *_) -> None:
        """Add the input (B, L, hidden) of a norm."""
        if key not in self.totals:
            return
        with without_autocast(x):
            for part in map(directions, parts_of(x)):
                # Copied to the device, and converted, once.
                self._numbers, self._order = self._numbers.to(x.device), self._order.to(x.device)
                self._axes = None if self._axes is None else self._axes.to(part)
                part = part[:, self._order] if self._axes is None else part @ self._axes
                means = part.square().cumsum(-1) / self._numbers
                self.totals[key] = self.totals[key] + means.sqrt().sum(0, dtype=torch.float64)


def measure_ratios(
    model: ElasticModel,
    texts: Iterable[Texts],
    axes: Tensor | None,
    order: Tensor,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, Tensor]:
    """The ratios of `NormRatios`: for every norm, the mean of rms_k / rms_D over all positions, (hidden,) float32.

    The channels are those after the rotation by `axes` (hidden, hidden); without it, those in `order` (hidden,).
    """
    sums, num_positions = RatioSums(model.config, axes, order), 0
    sliced = model.slice(observe=sums.observe)
    for part in texts:
        model.hidden_states(part.input_ids, sliced, part.documents)
        num_positions += part.input_ids.numel()
    found = torch.stack(list(sums.totals.values()))  # (norms, hidden)
    everything = reduce(torch.cat([found.flatten(), found.new_tensor([num_positions])])).cpu()
    means = (everything[:-1] / everything[-1]).float().view(found.shape)
    return dict(zip(sums.totals, means.unbind(), strict=True))


def rotated(config, name: str, tensor: Tensor, axes: Tensor, gains: dict[str, Tensor]) -> Tensor:
    """A parameter of a model in the basis `axes` (hidden, hidden), in the element type of `tensor`.

    `gains`: the gain (hidden,) of every norm. It is computed in float64, in blocks.
    """
    architecture, layout = architectures.of(config), architectures.parameter_layout(config)
    norm, dims = architectures.reading_matrices(config).get(name), layout[name]
    axes = axes.to(tensor.device)
    if name in gains:
        return torch.ones_like(tensor)
    if norm is not None:
        return _product(tensor, gains[norm].double()[:, None] * axes)
    if name == f"model.{architecture.EMBEDDINGS}.weight" or (len(dims) == 1 and _is_hidden(dims[0])):  # or a bias
        return _product(tensor, axes)
    if len(dims) > 1 and _is_hidden(dims[-2]):  # the matrix writes to the residual stream
        return _product(tensor.mT, axes).mT.contiguous()
    return tensor


def _is_hidden(dim: Dim) -> bool:
    return isinstance(dim, Units) and dim.key == "hidden"


def _product(tensor: Tensor, matrix: Tensor) -> Tensor:
    """tensor (..., n) @ matrix (n, n), in the element type of `tensor`. A block of rows is in float64 at a time."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    out, step = torch.empty_like(rows, memory_format=torch.contiguous_format), max(1, BLOCK_VALUES // rows.shape[1])
    for start in range(0, len(rows), step):
        out[start : start + step] = rows[start : start + step].double() @ matrix
    return out.view(tensor.shape)
