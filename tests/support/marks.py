"""Marks of test parameters."""

import pytest


def thorough(*values, **options):
    """A parameter whose test `make test` leaves out (see pyproject.toml)."""
    return pytest.param(*values, marks=pytest.mark.thorough, **options)


def all_but(quick, values) -> list:
    """All values as parameters; those that are not in `quick` are thorough."""
    return [value if value in quick else thorough(value) for value in values]
