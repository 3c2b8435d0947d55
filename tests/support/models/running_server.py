"""A server of `elastic serve` in a thread of the test."""

import contextlib
from collections.abc import Iterator

from tasks.serving.engine import Engine
from tasks.serving.family import Family
from tasks.serving.http.app import bind, create_app, running
from tasks.serving.http.service import Service
from tasks.serving.jobs import Limits
from tasks.serving.metrics import Metrics


@contextlib.contextmanager
def running_server(
    family: Family, limits: Limits, key: str | None = None, timeout: float = 60.0
) -> Iterator[tuple[str, Engine]]:
    """The address of a server on a free port, and its engine."""
    metrics = Metrics()
    engine = Engine(family, limits, metrics)
    app = create_app(Service(family, engine, metrics, timeout), key)
    with bind("127.0.0.1", 0) as address, running(app, engine, address) as url:
        yield url, engine
