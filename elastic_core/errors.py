"""The base class of all errors that the user can remove. Every other exception is a mistake of this library."""

from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST, _START, _END = 2000, 1400, 500  # characters of a line; of a longer one only its start and end are shown


class UserError(ValueError):
    """An error that the user can remove. Its text says what was given, what is allowed and where to change it."""

    @property
    def problems(self) -> list[str]:
        """What has to be changed, one text for each change."""
        return [str(self)]

    def report(self) -> str:
        """What a command prints at its end: a line for each problem."""
        return "\n".join(f"error: {problem}" for problem in self.problems)

    def __str__(self) -> str:
        """The text. Very long lines are shown without their middle: what was given may be a value of any size."""
        return "\n".join(map(_shortened, super().__str__().split("\n")))


@contextmanager
def named(where) -> Iterator[None]:
    """Start the text of every UserError of the block with `where`, such as the file with the values."""
    try:
        yield
    except UserError as error:
        raise type(error)("\n".join(f"{where}: {problem}" for problem in error.problems)) from None


def _shortened(line: str) -> str:
    return line if len(line) <= _LONGEST else f"{line[:_START]} … {line[-_END:]}"
