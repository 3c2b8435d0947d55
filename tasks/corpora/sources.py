"""The kinds of text sources. A section `prepare_data.sources.<name>` of params.yaml becomes one of them."""

from collections.abc import Mapping

from elastic_core import config
from elastic_core.config import ConfigError
from tasks.corpora.reasoning import Chains, Recall
from tasks.corpora.text_sources import Bible, Files, Sympy

Source = Bible | Sympy | Files | Chains | Recall
KINDS = {"bible": Bible, "sympy": Sympy, "files": Files, "chains": Chains, "recall": Recall}


def parse_source(values, where: str) -> Source:
    """The source that a section describes, as the dataclass of its kind.

    `where` is the start of error messages. Raises ConfigError for an unknown kind and for a wrong value.
    """
    kind = values.get("kind") if isinstance(values, Mapping) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{where}.kind: got {kind!r}; allowed: {', '.join(KINDS)}")
    return config.load(KINDS[kind], values, where)
