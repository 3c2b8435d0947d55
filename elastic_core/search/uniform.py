"""A heterogeneous submodel's even counterpart: what would have been served at its cost if all layers were cut alike."""

from __future__ import annotations

import bisect
import dataclasses
import statistics

from elastic_core.cost.metrics import PARAMETERS, Metric, exact_cost
from elastic_core.model import architectures
from elastic_core.model.axes import PER_LAYER, WIDTHS
from elastic_core.model.dims import layer_of
from elastic_core.model.submodel import Submodel, keys_of


def uniform_counterpart(config, submodel: Submodel, metric: Metric = PARAMETERS) -> Submodel:
    """The homogeneous submodel of the same layers and global widths whose cost is nearest to that of `submodel`.

    Every width that differs between the kept layers becomes its mean over them, rounded to what its groups allow; the
    one with the most steps (an MLP's, where that is among them) then takes the size that brings the cost nearest, from
    the smallest of its sizes in `submodel` upwards.
    A homogeneous submodel is its own counterpart.
    """
    submodel = submodel.resolve(config)
    units, sizes, target = architectures.units(config), submodel.sizes(config), exact_cost(metric, config, submodel)
    allowed, even = {}, submodel
    for name in PER_LAYER:
        if isinstance(getattr(submodel, name), tuple):
            keys = [key for key in keys_of(units, WIDTHS[name]) if layer_of(key) in submodel.kept_layers]
            unit, mean = units[keys[0]], statistics.mean(sizes[key] for key in keys)
            allowed[name] = range(min(sizes[key] for key in keys), unit.size + 1, unit.groups)
            nearest = min(allowed[name], key=lambda size, mean=mean: abs(size - mean))
            even = dataclasses.replace(even, **{name: nearest})
    if not allowed:
        return submodel
    finest = max(allowed, key=lambda name: len(allowed[name]))

    def cost(size: int) -> float:
        return exact_cost(metric, config, dataclasses.replace(even, **{finest: size}))

    above = bisect.bisect_left(allowed[finest], target, key=cost)  # costs rise with the size
    around = allowed[finest][max(0, above - 1) : above + 1]
    size = min(around, key=lambda size: abs(cost(size) - target))
    return dataclasses.replace(even, **{finest: size}).resolve(config)
