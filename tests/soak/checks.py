"""What is not left to chance: a damaged checkpoint, a full disk, two runs of one stage at once.

Each check carries a stage on from where it finds it and returns what is wrong.
"""

import contextlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from elastic_core.io.fingerprints import file_digest
from elastic_core.training.checkpoint import MANIFEST, read_manifest
from tests.soak import workspace as spaces
from tests.soak.trials import Kill, Stage

TOO_SMALL, ENOUGH = "4500k", "64m"  # of a disk; a checkpoint has 1.9 MB, two are kept, a third is being written


def newest(checkpoints: Path) -> Path:
    return max(checkpoints.glob("step-*"))


def truncate(checkpoint: Path) -> str:
    """Cut the largest file of a checkpoint to half; what the warning has to say."""
    path = max(checkpoint.iterdir(), key=lambda path: path.stat().st_size)
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size // 2)
    return f"checkpoint {checkpoint} is damaged ({path.name} has {size // 2} bytes, should have {size}); trying the"


def flip_bit(checkpoint: Path) -> str:
    """Turn one bit in the middle of a checkpoint's largest file; what the warning has to say."""
    path = max(checkpoint.iterdir(), key=lambda path: path.stat().st_size)
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x10]))
    return f"checkpoint {checkpoint} is damaged (the checksum of {path.name} does not match); trying the one before"


def intact(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint is as its manifest says, without the code that resumes from it."""
    files = read_manifest(checkpoint)["files"]
    names = {path.name for path in checkpoint.iterdir()} - {MANIFEST}
    return names == files.keys() and all(file_digest(checkpoint / name) == files[name]["sha256"] for name in names)


def second_run_is_refused(stage: Stage) -> list[str]:
    """Start the stage beside the one that runs; what is wrong with how it is told so.

    The first run stands still meanwhile: it shall not end before the second one has come so far.
    """
    command = [sys.executable, "-m", "tasks", spaces.STAGE]
    stage.process.send_signal(signal.SIGSTOP)
    second = subprocess.run(
        command, cwd=stage.directory, env=stage.variables, capture_output=True, text=True, timeout=100
    )
    stage.process.send_signal(signal.SIGCONT)
    last = second.stderr.strip().splitlines()[-1] if second.stderr.strip() else ""
    expected = f"error: {spaces.STAGE} already runs with these parameters and inputs (process {stage.process.pid} of "
    problems = [] if second.returncode == 1 else [f"the second run ended with {second.returncode}"]
    if not last.startswith(expected) or "Traceback" in second.stderr:
        problems.append(f"the second run said: {second.stderr[-300:]!r}")
    return problems + (["the first run ended beside the second"] if stage.has_ended() else [])


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """A file system of its own at `directory`, too small for the run; PermissionError where mounting is refused."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={TOO_SMALL}", "soak", str(directory)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        raise PermissionError("mounting a small tmpfs is refused here: it needs Linux and root")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def make_space(directory: Path) -> None:
    subprocess.run(["mount", "-o", f"remount,size={ENOUGH}", str(directory)], check=True)


def ends_for_want_of_space(stage: Stage, disk: Path) -> list[str]:
    """Start the stage on a disk that is too small; what is wrong with how it ends and with what it leaves."""
    stage.start()
    status, output = stage.process.wait(120), stage.output()
    problems = [] if status not in (0, None) else [f"exit status {status} on a full disk"]
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if len(errors) != 1 or "No space left on device" not in errors[0] or "Traceback" in output:
        problems.append(f"said: {output[-1500:]}")
    left = spaces.checkpoint_directory(stage.directory, disk)
    if left is None:
        return [*problems, "no checkpoint is left"]
    problems += [f"{path} is damaged" for path in left.glob("step-*") if not intact(path)]
    return problems


def two_runs_and_damage(prepared: spaces.Prepared, directory: Path, mark: str) -> list[str]:
    """One run: a second beside it is refused; killed twice, each time with a newest checkpoint that is damaged then."""
    stage = Stage(spaces.copy(prepared, directory), "driver", mark)
    stage.start()
    problems = [] if stage.reaches(Kill("SIGKILL", rows=1)) else ["the first run ended too early"]
    problems += second_run_is_refused(stage)
    for number, damage, rows in (("SIGKILL", truncate, 14), ("SIGTERM", flip_bit, 20)):
        if not stage.reaches(Kill(number, rows=rows)):
            return [*problems, "the run ended before it could be killed"]
        problems += stage.kill(number)
        checkpoint = newest(spaces.checkpoint_directory(directory))
        warning = damage(checkpoint)
        stage.start()
        stage.reaches(Kill(number, rows=spaces.num_rows(directory) + 6))
        if warning not in stage.output():
            problems.append(f"no warning of {checkpoint}: {stage.output()[-500:]}")
    problems += stage.finish()
    return problems + spaces.differences(spaces.outcome(directory), prepared.references[0])


def full_disk(prepared: spaces.Prepared, directory: Path, mark: str, kills: tuple[Kill, ...] = ()) -> list[str]:
    """`dvc repro` on a full disk, and again when there is space; PermissionError where mounting is refused."""
    with small_disk(directory.with_name(f"{directory.name}-disk")) as disk:
        stage = Stage(spaces.copy(prepared, directory, storage=disk), "dvc", mark)
        problems = ends_for_want_of_space(stage, disk)
        make_space(disk)
        stage.start()
        for kill in kills:
            if stage.reaches(kill):
                problems += stage.kill(kill.signal)
                stage.start()
        problems += stage.finish()
        return problems + spaces.differences(spaces.outcome(directory), prepared.references[0])
