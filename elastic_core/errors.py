"""The base class of all errors that the user can remove. Every other exception is a mistake of this library."""


class UserError(ValueError):
    """An error that the user can remove. Its text says what was given, what is allowed and where to change it."""
