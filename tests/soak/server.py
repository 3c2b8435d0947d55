"""A Prefect server of our own, to which the flows of trials report."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from flows.process.guard import guarded
from tests.soak.processes import environment, new_mark
from tests.support.ports import free_port


@contextlib.contextmanager
def prefect_server(directory: Path) -> Iterator[dict[str, str]]:
    """Run a server in `directory` for as long as the block runs; yields the settings by which flows find it."""
    directory.mkdir()
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    variables = environment(new_mark(), PREFECT_HOME=str(directory), PREFECT_SERVER_ANALYTICS_ENABLED="false")
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (
        open(directory / "server.log", "w") as log,
        guarded(command, cwd=directory, env=variables, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        deadline, client = time.monotonic() + 90, httpx.Client(timeout=5)
        while not _answers(client, url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"the Prefect server did not start: {(directory / 'server.log').read_text()[-2000:]}"
                )
            time.sleep(0.2)
        yield {"PREFECT_API_URL": url}


def _answers(client: httpx.Client, url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return client.get(f"{url}/health").status_code == 200
    return False
