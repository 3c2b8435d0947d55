"""The cost of a submodel, exact and expected (eq. 12): its parameters, the memory to serve it, or its time.

A metric is a frozen dataclass with a method `count(config, sizes, keep)`. `sizes` maps unit keys to sizes, and
`keep(i)` is 1, 0, or the probability that layer i is kept. With numbers, the count is exact. With tensors, the count is
differentiable; the tensors may have any shapes that broadcast together, so one call can count a grid of submodels. The
router, the selection and the targets use only `count`, so a new metric needs nothing else. Files: parameters.py,
memory.py, latency.py.
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
    """Read the metric of an ``elastic.json``. Raises UserError for a value that this version does not know."""
    if isinstance(value, str) and value in COUNTED:
        return COUNTED[value]
    fields = dict(value) if isinstance(value, Mapping) else {}
    name, reason = fields.pop("metric", value), ""
    try:
        if name == Memory.name:
            return Memory(**fields)
        if name in TIMED:
            return TIMED[name](Table.from_json(fields["table"]), fields["context"])
    except UserError as error:
        reason = f" ({error})"
    except (TypeError, ValueError, KeyError) as error:  # fields of another version
        reason = f" ({type(error).__name__}: {error})"
    raise UserError(
        f"cost: got {name!r}{reason}; allowed: parameters, active_parameters, or the fields of metric memory, latency "
        "or throughput, as this version writes them"
    )


def exact_cost(metric: Metric, config, submodel: Submodel | None = None) -> int | float:
    """The cost of `submodel` (None: the parent), in the unit of `metric`. Raises UserError for invalid sizes."""
    return metric.count(config, *_exact_sizes(config, submodel))


def expected_cost(metric: Metric, config, sizes: Mapping[str, Tensor], keep_probs: Tensor) -> Tensor:
    """The expected cost (eq. 12), differentiable.

    `sizes` maps unit keys to expected sizes. `keep_probs` (num_layers, ...) has the probability of each layer to be
    kept. All tensors may have any further shapes that broadcast together; then the result is a grid of costs.
    """
    return metric.count(config, sizes, keep=lambda layer: keep_probs[layer])


def num_parameters(config, submodel: Submodel | None = None) -> int:
    """The number of parameters of `submodel` (None: the parent), as in the files of the extracted model.

    It is sum(p.numel()) of that model. A mixture of experts also has the correction of its router's scores, which is
    a buffer in transformers and is counted too.
    """
    return exact_cost(PARAMETERS, config, submodel)


def num_active_parameters(config, submodel: Submodel | None = None) -> int | None:
    """The number of parameters of `submodel` (None: the parent) that one token uses; None if no layer has experts."""
    return exact_cost(ACTIVE_PARAMETERS, config, submodel) if architectures.has_experts(config) else None


def memory_parts(metric: Memory, config, submodel: Submodel | None = None) -> dict[str, int | float]:
    """The bytes of `submodel` (None: the parent) by purpose, see `Memory.parts`."""
    return metric.parts(config, *_exact_sizes(config, submodel))


def _exact_sizes(config, submodel: Submodel | None) -> tuple[dict[str, int], Callable[[int], int]]:
    """The arguments `sizes` and `keep` of `count` for one submodel."""
    submodel = (submodel or Submodel()).resolve(config)
    kept = set(submodel.kept_layers)
    return submodel.sizes(config), lambda layer: int(layer in kept)
