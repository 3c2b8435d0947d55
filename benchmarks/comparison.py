"""Two ways to do the same in turn, and what a process of its own holds at most."""

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
MB = 1e6

# VmHWM counts everything resident, pages of mapped files too; writing 5 to clear_refs lowers it to what is there now.
_MEASURED = """
import json, re, sys
from pathlib import Path

def status(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

{imports}
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
{body}
print(json.dumps([before, status("VmHWM")]))
"""


def in_turn(
    ways: dict[str, Callable[[], object]], repeats: int, between: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of every repeat of each way; the first round warms up. `between` runs before each, outside the time."""
    times = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, take in ways.items():
            between()
            begin = time.perf_counter()
            take()
            if repeat:
                times[name].append(time.perf_counter() - begin)
    return times


def median_ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    """The median over repeats of one way's time over the other's in the same round: a loaded machine slows both."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


def peak_allocated(function: Callable[[], object]) -> int:
    """Bytes that torch's allocator held at most while `function` ran, beyond what it held before. CPU only.

    From every allocation that the profiler records: exact and the same in every run, but blind to what is not a tensor
    (workspaces of libraries).
    """
    was_enabled = gc.isenabled()
    gc.disable()  # what earlier work has left in cycles of references must not be freed, and counted, meanwhile
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            function()
    finally:
        if was_enabled:
            gc.enable()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():  # as recorded: torch takes long to make its own of them
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def peak_memory(imports: str, body: str) -> tuple[int, int]:
    """Resident bytes of a fresh interpreter after `imports`, and at most while it ran `body`. Linux only."""
    code = _MEASURED.format(imports=imports, body=body)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the measured process failed: {done.stderr[-2000:]}")
    before, peak = json.loads(done.stdout.splitlines()[-1])
    return before, peak
