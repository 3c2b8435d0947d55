"""`python -m flows.dashboard`: server, worker and deployments in one foreground command; Ctrl-C ends all of them.

Everything runs under guards (flows/process/guard.py), so no process is left when this command is killed. Host, port and
directory come from prefect.toml or PREFECT_… environment variables. A run that a dead worker has left is marked as
crashed at the next start; otherwise it would keep the deployment's only slot.
"""

import contextlib
import fcntl
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.dashboard import deployments, pages
from flows.process import guard
from flows.publish import FILES_URL
from flows.records import NAMED

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120  # for the server to answer
STOP_SECONDS = 60  # for processes of a killed dashboard to end; its guards need a quarter of it
# The worker needs the longest grace: in that time a run ends its own stage within guard.GRACE_SECONDS.
WORKER_GRACE_SECONDS = 3 * guard.GRACE_SECONDS


@dataclass(frozen=True)
class Address:
    """Where the server listens and where its files are."""

    host: str
    port: int
    home: Path

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def pages(self) -> Path:
        """Where the server puts its pages."""
        return self.home / "ui"

    @property
    def files_port(self) -> int:
        """The port of the finished runs' files: the next one."""
        return self.port + 1

    @property
    def files_url(self) -> str:
        return f"http://{self.host}:{self.files_port}"


def main() -> None:
    """Bring everything up, wait, take everything down."""
    os.chdir(ROOT)  # prefect.toml is read from the working directory only
    os.environ["DO_NOT_TRACK"] = "1"
    address = read_address()
    os.environ["PREFECT_HOME"] = str(address.home)  # absolute: runs start in another directory
    os.environ["PREFECT_UI_STATIC_DIRECTORY"] = str(address.pages)
    guard.adopt_orphans()
    with only_dashboard(address) as lock:
        check_port(address)
        stop_on_signals()
        try:
            serve(address, lock)
        finally:
            guard.end_descendants()


def read_address() -> Address:
    """The settings of prefect.toml and the environment; an error if clients would look elsewhere for the server."""
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    address = Address(settings.server.api.host, settings.server.api.port, settings.home.resolve())
    if settings.api.url != f"{address.url}/api":
        sys.exit(
            f"api.url is {settings.api.url!r} but the server would listen on {address.url}; set api.url to "
            f"'{address.url}/api' or change server.api host and port (prefect.toml, or PREFECT_API_URL, "
            "PREFECT_SERVER_API_HOST and PREFECT_SERVER_API_PORT in the environment)"
        )
    return address


@contextlib.contextmanager
def only_dashboard(address: Address) -> Iterator[int]:
    """Hold this checkout's two locks; yield the file descriptor that guards have to inherit.

    The system releases a lock when the last process that holds it ends. Only this process holds the first lock: it says
    that a dashboard runs. The guards hold the second lock too: it says that processes of a killed dashboard still end.
    """
    address.home.mkdir(parents=True, exist_ok=True)
    with open(address.home / "dashboard.lock", "a+") as own, open(address.home / "guards.lock", "w") as shared:
        if not lock_file(own):
            own.seek(0)
            sys.exit(
                f"the dashboard of this checkout already runs (process {own.read().strip()}) at {address.url}; "
                "use it, or stop it with Ctrl-C where it was started"
            )
        own.truncate(0)
        print(os.getpid(), file=own, flush=True)
        deadline = time.monotonic() + STOP_SECONDS
        while not lock_file(shared):
            if time.monotonic() > deadline:
                sys.exit(f"processes of an earlier dashboard do not end; {shared.name} is locked by them")
            time.sleep(0.2)
        yield shared.fileno()


def lock_file(file) -> bool:
    """Lock the file if nobody else has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def check_port(address: Address) -> None:
    """End with a clear text if another program listens on one of our ports."""
    for port in (address.port, address.files_port):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            try:
                probe.bind((address.host, port))
            except OSError as error:
                sys.exit(
                    f"cannot listen on {address.host}:{port} ({error.strerror}); stop the program that does, or choose "
                    "another port: both [api] url and [server.api] port in prefect.toml (files are served at the next)"
                )


def stop_on_signals() -> None:
    """Exit on Ctrl-C, TERM and a closed terminal; ignore further signals while everything ends."""

    def stop(*_) -> None:
        for number in guard.STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        print("\nStopping …", flush=True)
        sys.exit(0)

    for number in guard.STOP_SIGNALS:
        signal.signal(number, stop)


def serve(address: Address, lock: int) -> None:
    """Run server, deployments and worker, until a signal comes or one of them ends."""
    prefect = [sys.executable, "-m", "prefect"]
    log = address.home / "server.log"
    options = {"pass_fds": (lock,), "env": {**os.environ, **variables(address)}}
    pages.only_first_version(address.pages)
    with (
        open(log, "w") as output,
        guard.guarded([*prefect, "server", "start"], stdout=output, stderr=output, **options) as server,
    ):
        print(f"Starting the server (its log: {log}) …", flush=True)
        wait_until_healthy(server, log)
        pages.correct(address.pages, address.url)
        deployments.create(variables(address))
        worker_command = [
            *prefect,
            "worker",
            "start",
            "--pool",
            deployments.POOL,
            "--type",
            "process",
            "--name",
            "dashboard",
        ]
        with (
            guard.guarded(files_command(address), stdout=output, stderr=output, **options),
            guard.guarded(worker_command, WORKER_GRACE_SECONDS, **options) as worker,
        ):
            print(greeting(address), flush=True)
            forms = deployments.Forms(variables(address))
            while server.poll() is None and worker.poll() is None:
                forms.keep_current()
                time.sleep(0.2)
            ended = f"the server ended, see {log}" if server.poll() is not None else "the worker ended"
            sys.exit(f"{ended}; stopping everything. Start again: runs that were cut off will be marked as crashed")


def variables(address: Address) -> dict[str, str]:
    """Environment variables of runs; any worker may start them, from any directory."""
    # They import `flows` and `tasks` from this checkout, whichever one is installed.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, FILES_URL: address.files_url, "DO_NOT_TRACK": "1"}


def files_command(address: Address) -> list[str]:
    """The command that serves the directories of finished runs, read-only, for the links in the UI."""
    directory = ROOT / NAMED
    directory.mkdir(parents=True, exist_ok=True)
    where = ["--bind", address.host, "--directory", str(directory)]
    return [sys.executable, "-m", "http.server", str(address.files_port), *where]


def wait_until_healthy(server: subprocess.Popen, log: Path) -> None:
    """Return when the server answers; exit with the end of its log where it does not."""
    from prefect.client.orchestration import get_client

    deadline = time.monotonic() + START_SECONDS
    with get_client(sync_client=True) as client:
        while client.api_healthcheck() is not None:
            if server.poll() is not None or time.monotonic() > deadline:
                tail = "".join(log.read_text().splitlines(keepends=True)[-20:])
                sys.exit(f"the server did not start; the end of {log}:\n{tail}")
            time.sleep(0.2)


def greeting(address: Address) -> str:
    """What to do next."""
    prefect = Path(sys.executable).with_name("prefect")
    command = str(prefect.relative_to(ROOT) if prefect.is_relative_to(ROOT) else prefect)
    return (
        f"\nDashboard:  {address.url}\n"
        "Run the pipeline, in another terminal (in this directory, because Prefect reads prefect.toml there):\n"
        f"  cd {shlex.quote(str(ROOT))} && {shlex.quote(command)} deployment run elastic/full --watch\n"
        "Ctrl-C stops everything.\n"
    )


if __name__ == "__main__":
    main()
