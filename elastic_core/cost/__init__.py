"""The cost of a submodel (parameters, memory, latency or throughput), and the notation of budgets.

Public: `num_parameters`, `num_active_parameters`, `exact_cost`.
"""

__all__ = ["exact_cost", "num_active_parameters", "num_parameters"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'elastic_core.cost' has no attribute {name!r}")
    from elastic_core.cost import metrics  # imported late: it needs torch, and reading budgets does not

    return getattr(metrics, name)
