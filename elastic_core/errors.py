"""Errors whose text tells the user what to change. All other exceptions are mistakes of this library."""


class UserError(ValueError):
    """Something that the user can change: the text says what was given, what is allowed and where to change it."""
