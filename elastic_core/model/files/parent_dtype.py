"""The element type of an imported parent's files: a key of config.json that a family keeps, for its exports.

A family is trained in float32. Its exports have the parent's type by default, as the files of the parent have.
"""

from __future__ import annotations

import copy

import torch

from elastic_core.errors import UserError

KEY = "parent_dtype"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # larger types stay float32 in exports


def with_parent_dtype(config, dtype: torch.dtype | None):
    """A copy of a configuration that says of which type the parent's files are. None: it says nothing of it."""
    config = copy.deepcopy(config)
    vars(config).pop(KEY, None)
    name = next((name for name, known in DTYPES.items() if known == dtype), None)
    if name is not None:
        setattr(config, KEY, name)
    return config


def parent_dtype(config, where: str) -> torch.dtype | None:
    """The type that the configuration says. None if it says nothing. Raises UserError for another value."""
    name = getattr(config, KEY, None)
    if name is not None and (not isinstance(name, str) or name not in DTYPES):
        raise UserError(f"{where}/config.json: {KEY} is {name!r}; allowed: {', '.join(DTYPES)}, or no such key")
    return None if name is None else DTYPES[name]
