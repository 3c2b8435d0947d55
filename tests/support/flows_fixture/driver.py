"""What the tests of the flows need to drive a checkout from outside: marked processes, a dashboard, its API."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import httpx
import psutil

from tests.support.ports import free_port

MARK = "FLOWS_TEST_MARK"  # in the environment of what a test starts, inherited by every descendant


def wait_for(condition, seconds: float, what: str, every: float = 0.1):
    """The first true value of `condition()`, which is asked for `every` so many seconds."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(every)
    return value


def marked(mark: str) -> list[str]:
    """The command lines of the living processes that carry this mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def copy_checkout(root: Path, path: Path) -> Path:
    """A checkout with all that git tracks or would track in this one, and a first commit."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(listed, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (root / name).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, path / name)
    as_somebody = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
    for arguments in (["init", "-q"], ["add", "."], [*as_somebody, "commit", "-q", "-m", "A copy"]):
        subprocess.run(["git", *arguments], cwd=path, check=True)
    return path


def set_params(checkout: Path, time_limits: dict | None = None, **train) -> None:
    sections = {"prepare_data": {"seconds": 0}, "train": train, "time_limits": time_limits or {}}
    (checkout / "params.yaml").write_text(json.dumps(sections))


class Dashboard:
    """`python -m flows.dashboard` in a temporary checkout, on a port and with a directory of its own."""

    def __init__(self, checkout: Path):
        port = free_port()
        self.checkout, self.url, self.mark = checkout, f"http://127.0.0.1:{port}/api", uuid.uuid4().hex
        settings = {"PREFECT_API_URL": self.url, "PREFECT_SERVER_API_PORT": str(port), MARK: self.mark}
        # What the surrounding tests may have set must not reach the dashboard.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        self.environment = {**kept, **settings}
        self.process = None
        # One for all calls, because making one takes longer than a call. The server may be another one at each call.
        self.client = httpx.Client(timeout=20, limits=httpx.Limits(max_keepalive_connections=0))

    def start(self) -> None:
        """Start it and wait until it is ready."""
        path = self.checkout / "dashboard.log"
        with open(path, "w") as log:
            self.process = self._popen(log)
        wait_for(lambda: "Ctrl-C stops" in path.read_text() or self.process.poll() is not None, 90, "the dashboard")
        assert self.process.poll() is None, path.read_text()

    def refused(self) -> str:
        """Start one that cannot run; what it says."""
        process = self._popen(subprocess.PIPE)
        output = process.communicate(timeout=60)[0].decode()
        assert process.returncode == 1
        return output

    def _popen(self, log) -> subprocess.Popen:
        command = [sys.executable, "-m", "flows.dashboard"]
        return subprocess.Popen(command, cwd=self.checkout, env=self.environment, stdout=log, stderr=subprocess.STDOUT)

    def kill(self) -> None:
        """After a failed test: every process, with no manners."""
        for process in psutil.process_iter(["environ"]):
            if (process.info["environ"] or {}).get(MARK) == self.mark:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def watch_run(self) -> subprocess.CompletedProcess:
        """What the README tells the user to type."""
        command = [sys.executable, "-m", "prefect", "deployment", "run", "elastic/full", "--watch"]
        return subprocess.run(
            command, cwd=self.checkout, env=self.environment, capture_output=True, text=True, timeout=120
        )

    def post(self, path: str, **body):
        """Call the API; 503 means that SQLite was busy, and Prefect's own clients also try again."""
        for _ in range(10):
            reply = self.client.post(f"{self.url}/{path}", json=body)
            if reply.status_code != 503:
                break
            time.sleep(0.5)
        reply.raise_for_status()
        return reply.json()

    def start_run(self) -> str:
        deployment = self.post("deployments/filter", deployments={"name": {"any_": ["full"]}})[0]["id"]
        return self.post(f"deployments/{deployment}/create_flow_run")["id"]

    def state(self, run: str) -> str:
        found = self.post("flow_runs/filter", flow_runs={"id": {"any_": [run]}})
        return found[0]["state_name"]

    def logs(self, run: str) -> str:
        found = self.post("logs/filter", logs={"flow_run_id": {"any_": [run]}})
        return "\n".join(log["message"] for log in found)
