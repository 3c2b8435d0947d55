"""What a submodel costs, exactly and in expectation (eq. 12): its parameters, the memory of serving it, or its time.

A metric is a frozen dataclass whose `count(config, sizes, keep)` reads sizes by unit key, and `keep(i)`, 1 or 0 or the
probability that layer i is kept. With numbers the count is exact; with tensors it is differentiable, and of shapes
that broadcast together, so that one call counts a whole grid of submodels. Whatever can be counted so is a metric:
routing, selection and targets ask for nothing else. Latency and throughput are in latency.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from elastic_core.cost.latency import TIMED, Timed
from elastic_core.cost.latency_table import Table
from elastic_core.cost.memory import Memory
from elastic_core.cost.parameters import ActiveParameters, Parameters
from elastic_core.errors import UserError
from elastic_core.model import architectures
from elastic_core.model.submodel import Submodel

Metric = Parameters | Memory | Timed
PARAMETERS, ACTIVE_PARAMETERS = Parameters(), ActiveParameters()
COUNTED = {metric.name: metric for metric in (PARAMETERS, ACTIVE_PARAMETERS)}


def read_metric(value: str | dict) -> Metric:
    """The metric of an ``elastic.json``. Raises ValueError for one that a later version may know."""
    if isinstance(value, str) and value in COUNTED:
        return COUNTED[value]
    fields = dict(value) if isinstance(value, Mapping) else {}
    name, reason = fields.pop("metric", value), ""
    try:
        if name == Memory.name:
            return Memory(**fields)
        if name in TIMED:
            return TIMED[name](Table.from_json(fields["table"]), fields["context"])
    except (TypeError, ValueError, KeyError) as error:
        reason = f" ({type(error).__name__}: {error})"
    raise UserError(
        f"cost: got {name!r}{reason}; allowed: parameters, active_parameters, or the fields of metric memory, latency "
        "or throughput, as this version writes them"
    )


def exact_cost(metric: Metric, config, submodel: Submodel | None = None) -> int | float:
    """Cost of `submodel` (None: the parent)."""
    return metric.count(config, *_certain(config, submodel))


def expected_cost(metric: Metric, config, sizes: Mapping[str, Tensor], keep_probs: Tensor) -> Tensor:
    """Expected cost (eq. 12), differentiable.

    `sizes` maps unit keys to expected sizes, `keep_probs` (layers, ...) holds the probability that depth keeps each
    layer. Entries may have any shapes that broadcast together, so one call can count a whole grid of submodels.
    """
    return metric.count(config, sizes, keep=lambda layer: keep_probs[layer])


def num_parameters(config, submodel: Submodel | None = None) -> int:
    """Number of parameters of `submodel` (None: the parent), equal to what the files of the extracted model hold.

    That is sum(p.numel()), and of mixtures of experts the correction of the router's scores, transformers' one buffer.
    """
    return exact_cost(PARAMETERS, config, submodel)


def num_active_parameters(config, submodel: Submodel | None = None) -> int | None:
    """Number of parameters of `submodel` (None: the parent) that one token uses; None where that is all of them."""
    return exact_cost(ACTIVE_PARAMETERS, config, submodel) if architectures.has_experts(config) else None


def memory_parts(metric: Memory, config, submodel: Submodel | None = None) -> dict[str, int | float]:
    """Bytes of `submodel` (None: the parent) by reason, see `Memory.parts`."""
    return metric.parts(config, *_certain(config, submodel))


def _certain(config, submodel: Submodel | None) -> tuple[dict[str, int], Callable[[int], int]]:
    """`sizes` and `keep` of one submodel."""
    submodel = (submodel or Submodel()).resolve(config)
    kept = set(submodel.kept_layers)
    return submodel.sizes(config), lambda layer: int(layer in kept)
