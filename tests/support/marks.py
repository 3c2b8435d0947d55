"""Marks of test parameters."""

import pytest


def thorough(*values):
    """A parameter whose test `make test` leaves out (see pyproject.toml)."""
    return pytest.param(*values, marks=pytest.mark.thorough)


def thorough_but(quick, values) -> list:
    """All values as parameters, thorough but for those in `quick`."""
    return [value if value in quick else thorough(value) for value in values]
