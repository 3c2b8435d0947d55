"""Every goal of speed and size against its alternative, in one table: `make bench`.

Times are medians of interleaved repeats and are compared by ratio within one run only. `--quick` measures smaller
shapes, for a test that everything runs. Writes benchmarks/results/<machine>.json; exits with 1 where a goal is missed.
"""

import argparse
import importlib
import os
import platform
import sys
from pathlib import Path

import torch

from benchmarks.report import FAIL, not_measured, table, write
from tasks.runs.provenance import processor_name

# Each is a module of benchmarks/sections with a function `rows(quick: bool) -> Iterator[Row]`.
SECTIONS = (
    *("steps", "scan", "losses", "ranking", "extraction", "serving", "server", "preparation", "checkpoints"),
    "start_up",
)
ON_A_GPU = (
    "kernels of mamba_ssm and causal_conv1d = torch, with gradients",
    "model FLOPs utilisation of 1.2 B at 8,192 tokens, goal ≥ 45 %",
    "context of 49,152 tokens: memory, tokens per second",
)
RESULTS = Path(__file__).with_name("results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help=f"of {', '.join(SECTIONS)}; none: all")
    parser.add_argument("--quick", action="store_true", help="smaller shapes")
    arguments = parser.parse_args()
    rows = []
    for section in arguments.sections or SECTIONS:
        for row in importlib.import_module(f"benchmarks.sections.{section}").rows(arguments.quick):
            print(f"{row.check}: {row.what}: {row.result} ({row.bound}) {row.status}", file=sys.stderr, flush=True)
            rows.append(row)
    if not arguments.sections:
        rows += [not_measured("on a GPU", what, "by `python -m benchmarks.gpu`") for what in ON_A_GPU]
    environment = {
        "machine": processor_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    print("\n" + ", ".join(f"{name}: {value}" for name, value in environment.items()) + "\n")
    print(table(rows))
    if not arguments.sections and not arguments.quick:
        name = "-".join(environment["machine"].lower().split()[:4])
        write(RESULTS / f"cpu-{name}.json", environment, rows)
    sys.exit(any(row.status == FAIL for row in rows))


if __name__ == "__main__":
    main()
