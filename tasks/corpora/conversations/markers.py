"""Marks special tokens that are ordinary text, in all texts of lists and objects."""

import re

START, END = "\U000f0000", "\U000f0001"  # around a special token that is ordinary text; transformers' own characters
MARKERS = re.compile(f"[{START}{END}]")


def strings(value):
    """All texts in lists and objects."""
    if value is None:
        return
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from strings(one)


def with_markers(value, pattern: re.Pattern):
    """A copy of texts, lists and objects, with markers around what the pattern matches."""
    if isinstance(value, str):
        return pattern.sub(f"{START}\\g<0>{END}", MARKERS.sub("", value))
    if isinstance(value, dict):
        return {name: with_markers(one, pattern) for name, one in value.items()}
    return [with_markers(one, pattern) for one in value] if isinstance(value, list) else value
