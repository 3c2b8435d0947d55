"""The base class of all errors that the user can remove. Every other exception is a mistake of this library."""


class UserError(ValueError):
    """An error that the user can remove. Its text says what was given, what is allowed and where to change it."""

    @property
    def problems(self) -> list[str]:
        """What has to be changed, one text for each change."""
        return [str(self)]

    def report(self) -> str:
        """What a command prints at its end: a line for each problem."""
        return "\n".join(f"error: {problem}" for problem in self.problems)
