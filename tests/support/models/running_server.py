"""A server of `elastic serve` in a thread of the test."""

import contextlib
import threading
import time
from collections.abc import Iterator

from tasks.serving.engine import Engine
from tasks.serving.family import Family
from tasks.serving.http.app import bind, create_app, new_server
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
    with bind("127.0.0.1", 0) as address:
        server = new_server(create_app(Service(family, engine, metrics, timeout), key))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [address]})
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield f"http://127.0.0.1:{address.getsockname()[1]}", engine
        finally:
            server.should_exit = True
            thread.join()
