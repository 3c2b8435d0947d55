"""Rotary positions that are scaled to longer texts: which values are allowed, in the form of transformers."""

from __future__ import annotations

from collections.abc import Mapping

from elastic_core.config import ConfigError, require

# In other types (dynamic, longrope), the frequencies depend on the length of the text. They are not supported here.
REQUIRED = {
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
ORIGINAL = "original_max_position_embeddings"
OPTIONAL = {
    "linear": (),
    "yarn": (ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": (ORIGINAL,),
}
ROPE_TYPES = ("default", *REQUIRED)


def check_rope_scaling(values: Mapping, key: str = "rope_scaling") -> None:
    """Raise ConfigError unless `values` is a valid scaling, such as {"rope_type": "yarn", "factor": 4.0}.

    `key` is the parameter's name in messages.
    """
    kind = values.get("rope_type")
    allowed = f"{', '.join(REQUIRED)} (in other types, the frequencies depend on the length of the text)"
    require(isinstance(kind, str) and kind in REQUIRED, f"{key}.rope_type", kind, allowed)
    known = ("rope_type", *REQUIRED[kind], *OPTIONAL[kind])
    for name in values:
        require(name in known, key, name, f"for {kind}: {', '.join(known)}")
    for name in REQUIRED[kind]:
        if name not in values:
            raise ConfigError(f"{key}.{name}: missing; rope_type {kind} needs {', '.join(REQUIRED[kind])}")
    for name, value in values.items():
        if name == ORIGINAL:
            valid = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            require(valid, f"{key}.{name}", value, "a number of tokens, 1 or more")
        elif name == "truncate":
            require(isinstance(value, bool), f"{key}.{name}", value, "true or false")
        elif name != "rope_type":
            least = 1 if name == "factor" else 0
            valid = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 and value >= least
            require(valid, f"{key}.{name}", value, "a number, 1 or more" if name == "factor" else "a number above 0")
    if kind == "llama3":
        low, high = values["low_freq_factor"], values["high_freq_factor"]
        require(high > low, f"{key}.high_freq_factor", high, f"above low_freq_factor ({low})")


def scaled_rope(own: Mapping, max_positions: int, scaling: Mapping) -> tuple[dict, int]:
    """A parent's rope_parameters and max_position_embeddings, with `scaling` instead of its own scaling.

    own: the parent's rope_parameters; max_positions: its max_position_embeddings. The scaling starts from
    original_max_position_embeddings if it is given, else from the length for which the parent was trained without
    scaling. The new maximum is that length times the factor, and never smaller than the old one.
    """
    original = own.get(ORIGINAL, max_positions)
    if own["rope_type"] == "linear":
        original = round(max_positions / own["factor"])
    original = scaling.get(ORIGINAL, original)
    parameters = {"rope_theta": own["rope_theta"], **scaling}
    if ORIGINAL in OPTIONAL[scaling["rope_type"]]:
        parameters[ORIGINAL] = original
    return parameters, max(max_positions, round(original * scaling["factor"]))
