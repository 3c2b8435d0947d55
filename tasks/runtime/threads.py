"""How many threads computations use, and how they wait for each other; set before torch is imported."""


def set_thread_defaults() -> None:
    """Environment variables that the caller has not set."""
