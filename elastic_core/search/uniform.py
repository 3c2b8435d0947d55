"""The uniform counterpart of a heterogeneous submodel: same layers, nearly the same cost, equal widths in all layers.

Comparing the two shows what widths that differ between layers gain.
"""

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
    """The uniform counterpart of `submodel`. A homogeneous submodel is its own counterpart.

    It keeps the same layers and the same global widths. A width that differs between the kept layers is replaced by its
    mean over them, rounded to a size that its groups allow. Then one width, that with the most allowed sizes (usually
    the MLP's), is set so that the cost is as near as possible to the cost of `submodel` in `metric`. Sizes below the
    smallest one in `submodel` are not allowed.
    """
    submodel = submodel.resolve(config)
    units, sizes, target = architectures.units(config), submodel.sizes(config), exact_cost(metric, config, submodel)
    allowed, uniform = {}, submodel
    for name in PER_LAYER:
        if isinstance(getattr(submodel, name), tuple):
            keys = [key for key in keys_of(units, WIDTHS[name]) if layer_of(key) in submodel.kept_layers]
            unit, mean = units[keys[0]], statistics.mean(sizes[key] for key in keys)
            allowed[name] = range(min(sizes[key] for key in keys), unit.size + 1, unit.groups)
            nearest = min(allowed[name], key=lambda size, mean=mean: abs(size - mean))
            uniform = dataclasses.replace(uniform, **{name: nearest})
    if not allowed:
        return submodel
    finest = max(allowed, key=lambda name: len(allowed[name]))

    def cost(size: int) -> float:
        return exact_cost(metric, config, dataclasses.replace(uniform, **{finest: size}))

    above = bisect.bisect_left(allowed[finest], target, key=cost)  # The cost rises with the size.
    nearest_sizes = allowed[finest][max(0, above - 1) : above + 1]
    size = min(nearest_sizes, key=lambda size: abs(cost(size) - target))
    return dataclasses.replace(uniform, **{finest: size}).resolve(config)
