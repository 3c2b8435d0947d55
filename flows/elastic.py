"""The Prefect flow `elastic`: one task per stage of dvc.yaml, in the order of that file.

DVC decides what is stale; Prefect shows, queues and cancels. A task runs `dvc repro --single-item STAGE` under the
guard (flows/guard.py) and passes its output to the run's log line by line. At the end the results table and the
report become artifacts.
"""

import codecs
import json
import math
import os
import re
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.guard import guarded

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("reports/results.json")
REPORT = Path("reports/report.md")

PROGRESS_SECONDS = 5.0  # between two log lines of one progress bar

# A line and how it ended. A carriage return at the very end stays unread: the next byte tells whether it is "\r\n".
_LINE = re.compile(r"([^\r\n]*)(\r?\n|\r(?=[^\n]))")
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_BUSY = re.compile(r"^ERROR: .*(is busy, it is being blocked by|Unable to acquire lock)")


class StageFailed(RuntimeError):
    """A stage ended with an error; the message carries its last lines."""


class StageBusy(StageFailed):
    """Another DVC process holds the lock of this stage; worth another try."""


@flow(name="elastic")
def elastic(profile: str = "default", force: bool = False) -> None:
    """One parent in, one elastic checkpoint and its submodels out, evaluated and reported.

    Args:
        profile: "default" runs in the checkout with params.yaml; the name of a file in profiles/ runs in a workspace
            of its own, .runs/PROFILE/, with that file's parameters on top.
        force: run every stage, also those that DVC finds unchanged.
    """
    # Stages are called and not submitted: only in the main thread does a cancellation interrupt a silent stage.
    workspace = open_workspace(profile, ROOT / "profiles")
    check_params(profile, workspace)
    for stage in stage_names(workspace):
        run_stage.with_options(name=stage, task_run_name=stage)(stage, workspace, force)
    publish(profile, workspace)


def open_workspace(profile: str, profiles: Path) -> Path:
    """The directory in which this profile runs, ready to use; ValueError for a profile that does not exist."""
    known = ["default", *sorted(path.stem for path in profiles.glob("*.yaml") if path.stem != "default")]
    if profile not in known:
        raise ValueError(
            f"profile: got {profile!r}; allowed: {', '.join(known)}. A new one is a new file profiles/NAME.yaml"
        )
    from tasks import workspace

    return workspace.prepare(profile)


def check_params(profile: str, workspace: Path) -> None:
    """Refuse wrong parameters now and not when their stage comes, which may be hours later."""
    status, lines = follow([sys.executable, "-m", "tasks.params"], workspace, get_run_logger().info)
    if status != 0:
        raise ValueError(f"the parameters of profile {profile!r} are not valid:\n" + "\n".join(lines))


def stage_names(workspace: Path) -> list[str]:
    """The stages, foreach groups counted as one, in the order of dvc.yaml."""
    from ruamel.yaml import YAML

    return list(YAML(typ="safe").load(workspace / "dvc.yaml")["stages"])


def is_busy(task, task_run, state: State) -> bool:
    """The condition for a retry: DVC's lock, never a failed stage."""
    return isinstance(state.result(raise_on_failure=False), StageBusy)


@task(retries=12, retry_delay_seconds=5, retry_condition_fn=is_busy, cache_policy=NO_CACHE)
def run_stage(stage: str, workspace: Path, force: bool = False) -> State:
    """Bring one stage of dvc.yaml, or every item of a foreach group, up to date."""
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", *(["--force"] if force else []), stage]
    logger = get_run_logger()
    ran = []

    def log(line: str) -> None:
        logger.info(line)
        if line.startswith("Running stage "):
            ran.append(line.split("'")[1])

    status, lines = follow(command, workspace, log)
    if status != 0:
        busy = any(_BUSY.match(line) for line in lines)
        raise (StageBusy if busy else StageFailed)(
            f"stage {stage!r} ended with exit status {status} in {workspace}; its last lines:\n" + "\n".join(lines)
        )
    if not ran:
        return Completed(name="Unchanged", message="Its inputs, parameters and code are those of an earlier run")
    return Completed(message=f"Ran {', '.join(ran)}")


def follow(command: list[str], workspace: Path, log: Callable[[str], None]) -> tuple[int, list[str]]:
    """Run a command under the guard, hand each line of its output to `log`; the exit status and the last lines."""
    environment = {
        **os.environ,
        # dvc.yaml says `python`; it shall be this one.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
    }
    tail = deque(maxlen=TAIL_LINES)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with guarded(command, cwd=workspace, env=environment, **pipes) as process:
        for line in read_lines(read_chunks(process)):
            tail.append(line)
            log(line)
        return process.wait(), list(tail)


def read_chunks(process: subprocess.Popen) -> Iterator[bytes]:
    """The process's output as it comes."""
    source = process.stdout.fileno()
    while True:
        ready, _, _ = select.select([source], [], [], 1.0)
        if ready:
            chunk = os.read(source, 65536)
            if not chunk:
                return
            yield chunk
        elif process.poll() is not None:
            return  # somebody killed the guard: what is left of the command would hold the pipe open


def read_lines(chunks: Iterable[bytes], every: float = PROGRESS_SECONDS) -> Iterator[str]:
    """Split output into lines, without blank ones and colours.

    Of lines that end in a carriage return (a progress bar drawn over itself) one is shown every `every` seconds; what
    finally stands on the terminal is always shown.
    """
    hidden, shown_at = "", -math.inf
    for line, end in _split(chunks):
        if end != "\r":
            line, hidden = line or hidden, ""
        elif line and time.monotonic() - shown_at < every:
            line, hidden = "", line
        elif line:
            hidden, shown_at = "", time.monotonic()
        if line:
            yield line


def _split(chunks: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """Each line, clean, and how it ended: "\\r" for one that will be drawn over, else "\\n"."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    rest = ""
    for chunk in chunks:
        rest += decoder.decode(chunk)
        start = 0
        for match in _LINE.finditer(rest):
            start = match.end()
            yield _COLOUR.sub("", match[1]).rstrip(), match[2][-1]
        rest = rest[start:]
    yield _COLOUR.sub("", rest).rstrip(), "\n"


def publish(profile: str, workspace: Path) -> None:
    """Show the results table and the report beside the run, as artifacts."""
    for path in (RESULTS, REPORT):
        if not (workspace / path).is_file():
            raise FileNotFoundError(
                f"{path} is not there after the last stage; the stage that writes it is in dvc.yaml"
            )
    rows = json.loads((workspace / RESULTS).read_text())
    keys = [list(row) for row in rows]
    if not keys or any(row_keys != keys[0] for row_keys in keys):
        # The table's columns are those of its first row.
        raise ValueError(f"{RESULTS}: expected a list of rows with the same keys in each, got the keys {keys}")
    create_table_artifact(key="results", table=rows, description=f"Results of profile `{profile}` ({RESULTS})")
    create_markdown_artifact(
        key="report", markdown=(workspace / REPORT).read_text(), description=f"Report of profile `{profile}`"
    )
