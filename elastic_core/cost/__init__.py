"""What a submodel costs: parameters, memory, latency, throughput; and how people write budgets.

Public: `num_parameters`, `num_active_parameters`, `exact_cost`.
"""

__all__ = ["exact_cost", "num_active_parameters", "num_parameters"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'elastic_core.cost' has no attribute {name!r}")
    from elastic_core.cost import metrics  # needs torch, which reading budgets does not

    return getattr(metrics, name)
