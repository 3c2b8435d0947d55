"""One pretrained language model in, one elastic checkpoint out, with a nested submodel for every budget.

A name is imported when it is first used. So settings and command lines start without torch.
"""

import importlib

_MODULES = {
    "ElasticModel": "elastic_core.model.elastic_model",
    "Submodel": "elastic_core.model.submodel",
    "rank": "elastic_core.search.importance.ranking",
    "sort_": "elastic_core.search.importance.sorting",
    "extract": "elastic_core.export.extract",
    "NestedModel": "elastic_core.export.nested",
    "cost": "elastic_core.cost",
}
__all__ = ["ElasticModel", "NestedModel", "Submodel", "cost", "extract", "rank", "sort_"]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'elastic_core' has no attribute {name!r}")
    module = importlib.import_module(_MODULES[name])
    return module if name == "cost" else getattr(module, name)
