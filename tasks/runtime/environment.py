"""Environment variables that make the processes of a stage fast. A variable that is already set keeps its value.

`python -m tasks.runtime.environment` prints them for `env`, which starts a process that has them all.
"""

import os

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
DEFAULTS = {
    "OMP_NUM_THREADS": str(CORES),
    # How often a thread looks for the end of its wait before it sleeps. By default it looks 300,000 times, and where
    # another process keeps a core busy, it takes the other core from the thread that it waits for. More is faster on an
    # idle machine and slower on a busy one (docs/performance.md).
    "GOMP_SPINCOUNT": "1000",
    # glibc gives large freed blocks back to the kernel at once, and a training step then pays for the page faults.
    # A process reads these two when it starts, so they reach the processes that a stage starts.
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "TOKENIZERS_PARALLELISM": "true",
}


def set_defaults() -> None:
    """Set the variables for this process and those that it starts. Call it before torch is imported."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    print(*(f"{name}={os.environ.get(name, value)}" for name, value in DEFAULTS.items()))
