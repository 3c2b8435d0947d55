"""The Ray cluster of a stage: the one at RAY_ADDRESS, or one on this machine that ends with the stage."""

import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from elastic_core.config import ConfigError
from tasks.runtime.ray_cleanup import nothing_left
from tasks.settings.sections import Compute

ANSWER_SECONDS = 8  # for a cluster to show that it is there
SHORT = "/tmp"
SOCKET_BYTES = 107 if sys.platform == "linux" else 103  # the longest path of a Unix socket
SOCKET = "/ray/session_2026-01-01_00-00-00_123456_1234567/sockets/plasma_store"  # what Ray appends to its directory
HTTP2_SETTINGS = 4  # the type of a frame, its fourth byte (RFC 9113)
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, HTTP2_SETTINGS, 0, 0, 0, 0, 0])
ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray's own value is 15: beside another busy process on the same cores, workers would get a thirtieth of a core.
    "RAY_worker_niceness": "0",
}
LOCAL = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}  # a process that asks whether this machine is being taken away


def prepare(compute: Compute) -> str | None:
    """Set the environment for Ray before it is imported; the address of its cluster. Raises ConfigError without one."""
    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
    address = os.environ.get("RAY_ADDRESS")
    if compute.workers and address not in (None, "", "local"):
        check_cluster(address)
        if has_token():  # Ray's clusters ask for one by default; a client has to be told, before it is imported
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    return address


@contextlib.contextmanager
def cluster(compute: Compute, address: str | None) -> Iterator[None]:
    """Connect to the cluster at `address`, or start one on this machine that ends with the block."""
    import ray

    is_local = address in (None, "", "local")
    environment = {
        "env_vars": {**ENVIRONMENT, **(LOCAL if is_local else {}), "PYTHONPATH": python_path()},
        "worker_process_setup_hook": "tasks.runtime.quiet.silence_libraries",
    }
    options = {"logging_level": "ERROR", "runtime_env": environment}
    if is_local:
        cores = max(os.cpu_count() or 1, compute.workers * compute.cpus_per_worker)
        options |= {"address": "local", "include_dashboard": False, "num_cpus": cores}
    else:
        options["address"] = address
    with contextlib.ExitStack() as stack:
        if is_local:
            if (directory := stack.enter_context(short_directory())) is not None:
                options["_temp_dir"] = directory
            stack.enter_context(nothing_left())
        try:
            ray.init(**options)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            raise ConfigError(
                f"RAY_ADDRESS: {address} does not let this process in ({error}); it needs the cluster's Ray version "
                "and token (~/.ray/auth_token, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH)"
            ) from None
        try:
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def short_directory() -> Iterator[str | None]:
    """A temporary directory for Ray's files where TMPDIR is too long for them; None where it is short enough.

    Ray puts Unix sockets there, and the system limits the length of their paths. Raises ConfigError if there is no
    other directory that is short enough.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"  # as in Ray
    given, most = os.environ.get(name, SHORT), SOCKET_BYTES - len(SOCKET)
    if len(os.fsencode(os.path.abspath(given))) <= most:
        yield None
        return
    try:
        directory = tempfile.TemporaryDirectory(prefix="ray-", dir=SHORT, ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigError(
            f"{name}: got {given!r}; allowed: a directory with a path of up to {most} bytes, because Ray puts sockets "
            f"there; {SHORT} cannot be used instead ({error.strerror})"
        ) from None
    with directory as path:
        yield path


def has_token() -> bool:
    """Whether a token for a Ray cluster is where Ray looks for one."""
    named = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return named or (Path.home() / ".ray" / "auth_token").is_file()


def python_path() -> str:
    """PYTHONPATH of the workers: they import this checkout, whichever version is installed there."""
    return os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])


def check_cluster(address: str) -> None:
    """Raise ConfigError unless a server that may be Ray answers at `address` within ten seconds.

    Ray itself would wait for minutes. Ray speaks gRPC over HTTP/2, and an HTTP/2 server greets with a SETTINGS frame.
    Ray's own client then says at once whether version and token are right.
    """
    advice = "start it, correct RAY_ADDRESS, or unset it to use this machine"
    if address == "auto":
        return  # Ray itself says at once that no cluster runs on this machine
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"RAY_ADDRESS: got {address!r}; allowed: HOST:PORT, ray://HOST:PORT, auto or local")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS / 2) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            connection.sendall(HTTP2_GREETING)
            answer = connection.recv(9, socket.MSG_WAITALL)
    except OSError as error:
        raise ConfigError(f"RAY_ADDRESS: no Ray cluster answers at {address} ({error}); {advice}") from None
    if len(answer) < 9 or answer[3] != HTTP2_SETTINGS:
        raise ConfigError(f"RAY_ADDRESS: what listens at {address} is no Ray cluster; {advice}")
