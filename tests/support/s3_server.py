"""A real S3 server (SeaweedFS, one process) on free loopback ports, which a test can kill and bring back."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.support.ports import free_ports

KEY, SECRET, BUCKET = "test-key", "a-secret-that-nobody-may-see", "test"
_COMPONENTS = ("master", "volume", "filer", "s3", "admin")  # each takes a port, and port + 10000 for gRPC
_GRPC = 10_000


class S3Server:
    """A running server: `url`, `bucket`, and `environment`, the variables with which a client finds it.

    `place` is a URL in the bucket below which nothing is yet.
    """

    def __init__(self, directory: Path):
        self.directory, self.bucket, self.process = directory, BUCKET, None
        self.place = ""
        self._ports: list[int] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._ports[_COMPONENTS.index('s3')]}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start on free ports; another process may take one in between, so a start that fails is tried again."""
        for _ in range(5):
            self._ports = free_ports(12_000, 21_000, len(_COMPONENTS), twin=_GRPC)  # and gRPC's
            if self._launch():
                self._wait_for_bucket()
                return
        raise RuntimeError(f"the S3 server does not start; its log ends:\n{self._log_end()}")

    def kill(self) -> None:
        """SIGKILL, as when the machine goes down."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """Come back with the same data on the same ports."""
        if not self._launch():
            raise RuntimeError(f"the S3 server does not come back; its log ends:\n{self._log_end()}")

    def ensure_running(self) -> None:
        if self.process.poll() is not None:
            self.restart()

    def new_place(self) -> None:
        self.place = f"s3://{self.bucket}/{secrets.token_hex(6)}"

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def _launch(self) -> bool:
        weed = Path(sysconfig.get_path("scripts")) / "weed"
        command = [str(weed), "mini", f"-dir={self.directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += ["-master.telemetry=false", "-admin.ui=false", "-webdav=false", f"-bucket={self.bucket}"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += [f"-{name}.port={port}" for name, port in zip(_COMPONENTS, self._ports, strict=True)]
        environment = os.environ | {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self.process.poll() is None:
            if self._is_up():
                return True
            time.sleep(0.05)
        self.stop()
        return False

    def _is_up(self) -> bool:
        try:
            urllib.request.urlopen(self.url, timeout=1)
        except urllib.error.HTTPError:  # 403, since nothing is signed here: it answers
            return True
        except OSError:
            return False
        return True

    def _wait_for_bucket(self) -> None:
        """The server answers a little before it has made its bucket."""
        from botocore.exceptions import ClientError
        from botocore.session import Session

        account = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
        client, deadline = Session().create_client("s3", endpoint_url=self.url, **account), time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(ClientError):
                client.head_bucket(Bucket=self.bucket)
                return
            time.sleep(0.05)
        raise RuntimeError(f"the S3 server makes no bucket; its log ends:\n{self._log_end()}")

    def _log_end(self) -> str:
        return (self.directory / "log").read_text(errors="replace")[-2000:]


@contextlib.contextmanager
def s3_server():
    """A server with an empty bucket, gone with all its data at the end."""
    directory = Path(tempfile.mkdtemp(prefix="weed-"))
    server = S3Server(directory)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)
