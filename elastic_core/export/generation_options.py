"""Options of transformers' `generate`: which value counts, and which options cannot be allowed."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import GenerationConfig

from elastic_core.errors import UserError

# With other values than these, the result is no tensor with one row for each row of the input.
ONE_TENSOR = {"return_dict_in_generate": False, "num_return_sequences": 1}


def value_of(name: str, options: Mapping, generation: GenerationConfig):
    """The value of an option, or None: that in `options`, else in its `generation_config`, else in `generation`.

    generation: the model's. `generate` takes its values for those that the given configuration does not have.
    """
    if name in options:
        return options[name]
    given = getattr(options.get("generation_config"), name, None)
    return getattr(generation, name, None) if given is None else given


def check_options(allowed: Mapping[str, object], options: Mapping, generation: GenerationConfig, where: str) -> None:
    """Raise UserError, which ends with `where`, if an option has another value than None and the allowed one."""
    found = {name: value_of(name, options, generation) for name in allowed}
    refused = [name for name, value in found.items() if value is not None and not _is(value, allowed[name])]
    if refused:
        raise UserError(f"{', '.join(refused)}: not allowed {where}")


def _is(value, allowed) -> bool:
    return allowed is not None and value == allowed
