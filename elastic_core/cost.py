"""Costs of a submodel. This file counts parameters, exactly and in expectation."""

from collections.abc import Mapping

from torch import Tensor

from elastic_core import families
from elastic_core.layout import count
from elastic_core.submodel import Submodel


def num_parameters(config, submodel: Submodel | None = None) -> int:
    """Number of parameters of `submodel` (None: the parent), equal to sum(p.numel()) of the extracted model."""
    submodel = (submodel or Submodel()).resolve(config)
    kept = set(submodel.kept_layers)
    return count(families.parameter_layout(config), submodel.sizes(config), keep=lambda layer: int(layer in kept))


def expected_num_parameters(config, sizes: Mapping[str, Tensor], keep_probs: Tensor) -> Tensor:
    """Expected number of parameters (eq. 12), differentiable.

    `sizes` maps unit keys to expected sizes, `keep_probs` (layers, ...) holds the probability that depth keeps each
    layer. Entries may have any shapes that broadcast together, so one call can count a whole grid of submodels.
    """
    return count(families.parameter_layout(config), sizes, keep=lambda layer: keep_probs[layer])
