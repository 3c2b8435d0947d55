"""Reads the files of lm-eval tasks without lm-eval, whose import is slow."""

from collections.abc import Iterator
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor


class _Constructor(SafeConstructor):
    """Reads lm-eval's own tags, such as ``!function``, as plain values."""


_Constructor.add_multi_constructor("!", lambda constructor, suffix, node: suffix)


def data_files(include: Path, data_root: Path) -> list[Path]:
    """The data files that the task files below `include` name; relative ones start at `data_root`."""
    found: set[Path] = set()
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    for path in sorted(include.rglob("*.yaml")):
        content = yaml.load(path)
        options = content.get("dataset_kwargs") if isinstance(content, dict) else None
        if isinstance(options, dict):
            names = _strings(options.get("data_files")) if "data_files" in options else ()
            found |= {data_root / name for name in names if "://" not in name}
    return sorted(found)


def _strings(value) -> Iterator[str]:
    """All strings in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for item in value.values() for text in _strings(item))
    elif isinstance(value, (list, tuple)):
        yield from (text for item in value for text in _strings(item))
